from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlscl import methods
from fedlscl.data import Fake, Folder, SpatialTemporalDataModule, TorchDatasets
from fedlscl.federated.readout import ReadoutConfig
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.options import Count, Interval, NonNegative, Positive, Whole, check_options


@dataclass
class Options:
    rate: Positive = 1.0
    weight: NonNegative = 0.0
    steps: Count | None = 1
    kept: Whole = 0
    share: Annotated[float, Interval("(0, 1]")] = 1.0
    rank: Count | Annotated[float, Interval("(0, 1)")] | Literal["all"] = "all"
    kind: Literal["a", "b"] = "a"
    kinds: list[Literal["a", "b"]] = field(default_factory=list)
    path: str = ""
    state: Count = field(default=0, init=False)

    def __post_init__(self):
        check_options(self, "group.")


@given(
    st.floats(0, exclude_min=True, allow_infinity=False),
    st.none() | st.integers(1),
    st.floats(0, 1, exclude_min=True),
    st.integers(1) | st.floats(0, 1, exclude_min=True, exclude_max=True) | st.just("all"),
    st.lists(st.sampled_from("ab")),
)
def test_values_in_range_pass(rate, steps, share, rank, kinds):
    Options(rate=rate, weight=rate, steps=steps, kept=steps or 0, share=share, rank=rank, kinds=kinds)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rate", 0, "> 0"),
        ("rate", float("nan"), "> 0"),
        ("rate", float("inf"), "> 0"),
        ("rate", True, "> 0"),
        ("rate", "1", "> 0"),
        ("weight", -1e-9, ">= 0"),
        ("steps", 0, ">= 1"),
        ("steps", 1.5, "an integer >= 1"),
        ("kept", -1, ">= 0"),
        ("share", 0.0, "in (0, 1]"),
        ("share", 1.1, "in (0, 1]"),
        ("rank", 0, ">= 1 or in (0, 1) or all"),
        ("rank", "most", "an integer >= 1 or in (0, 1) or all"),
        ("kind", "c", "one of a, b"),
        ("kinds", ["a", "c"], "one of a, b"),
        ("kinds", "ab", "a list"),
    ],
)
def test_other_values_are_refused_in_one_line(name, value, rule):
    with pytest.raises(ValueError) as refused:
        Options(**{name: value})
    assert str(refused.value) == f"group.{name} must be {rule}, got {value!r}."


CONFIGURABLE = [
    *(getattr(methods, name) for name in methods.__all__),
    FederatedTrainer,
    ReadoutConfig,
    SpatialTemporalDataModule,
    Fake,
    Folder,
    TorchDatasets,
]


@pytest.mark.parametrize("configurable", CONFIGURABLE, ids=lambda configurable: configurable.__name__)
def test_every_number_states_its_range(configurable):
    kinds = get_type_hints(configurable, include_extras=True)
    bare = {name.name for name in fields(configurable) if name.init and {int, float} & {*numbers(kinds[name.name])}}
    assert not bare


def numbers(kind):
    """Types in a type, except those with a range."""
    yield kind
    if get_origin(kind) is not Annotated:
        for inner in get_args(kind):
            yield from numbers(inner)
