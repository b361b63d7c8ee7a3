"""Ranges and choices of options: an annotation states them, ``check_options`` checks them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class Interval:
    """Numbers between two ends; a round bracket leaves its end out.

    Example:
        >>> Interval("[1, inf)"), Interval("(0, 1]"), 0 in Interval("(0, 1]")
        (>= 1, in (0, 1], False)
    """

    def __init__(self, text: str) -> None:
        self.low, self.high = map(float, text[1:-1].split(","))
        self.has_low, self.has_high = text[0] == "[", text[-1] == "]"
        self.text = f"in {text}" if math.isfinite(self.high) else f"{'>=' if self.has_low else '>'} {self.low:g}"

    def __contains__(self, value: Any) -> bool:
        is_above = value >= self.low if self.has_low else value > self.low
        return is_above and (value <= self.high if self.has_high else value < self.high)

    def __repr__(self) -> str:
        return self.text


Positive = Annotated[float, Interval("(0, inf)")]
NonNegative = Annotated[float, Interval("[0, inf)")]
Count = Annotated[int, Interval("[1, inf)")]
"""A whole number >= 1."""
Whole = Annotated[int, Interval("[0, inf)")]
"""A whole number >= 0."""


def check_options(options: Any, prefix: str = "") -> None:
    """Check every field of a dataclass whose type states a range (`Interval`) or choices (``Literal``).

    Raises:
        ValueError: naming the first field that violates its type.
    """
    kinds = get_type_hints(type(options), include_extras=True)
    for name in (field.name for field in fields(options) if field.init):
        rules = list(_violated(kinds[name], getattr(options, name)))
        if rules:
            raise ValueError(f"{prefix}{name} must be {' or '.join(rules)}, got {getattr(options, name)!r}.")


def _violated(kind: Any, value: Any) -> Iterator[str]:
    """The rules of a type that a value violates; none if the type has no rules, or one of a union's types fits."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated and isinstance(inner[1], Interval):
        is_number = isinstance(value, Integral if inner[0] is int else Real) and not isinstance(value, bool)
        if not is_number or value not in inner[1]:
            yield ("" if is_number or inner[0] is not int else "an integer ") + str(inner[1])
    elif origin is Literal:
        if value not in inner:
            yield ("one of " if len(inner) > 1 else "") + ", ".join(map(str, inner))
    elif origin in (Union, UnionType):
        if value is not None:
            rules = [list(_violated(one, value)) for one in inner if one is not type(None)]
            yield from chain(*rules) if all(rules) else ()
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            yield "a list"
        else:
            yield from dict.fromkeys(chain(*(_violated(inner[0], entry) for entry in value)))
