"""A parser that takes no abbreviations and says in one line what is wrong."""

import difflib
import re
from argparse import ArgumentError
from collections.abc import Iterable
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from fedlscl import methods
from fedlscl.cli.configuration import SEED_RULE

REQUIRED = re.compile(r"arguments are required: (?:\w+\.)?([\w.]+)")
KEY = re.compile(r'Parser key "([^"]+)"')
UNKNOWN = re.compile(r"(?:Group '(?P<group>[^']+)' does not|Option|does not) (?:accept option )?'(?P<key>[^']+)'")
UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<key>[^\s=]+)")
INNER = re.compile(r"given class_path '([^']+)':\n(.+?)\s*(?:\n\s*- Expected|\n\s*Given value|$)", re.DOTALL)
NO_CLASS = re.compile(r"Expected a dot import path string|Import path .*does not correspond")
EXPECTED = re.compile(r"Expected an? (.+?)(?=\. Got value|\s*$)", re.MULTILINE)
CLASS_PATH = re.compile(r"'class_path': '([^']+)'")
NO_SEED = re.compile(r"invalid seed value: '(.*)'$")
RESTRICTED = re.compile(r"(\S+) does not conform to restriction (.+)")
VALUE = re.compile(r"(?:Got value|Given value): (.+)")
NESTED_VALUE = re.compile(r"NestedArg\(key='([^']+)', val='?(.*?)'?\)$")


class Parser(LightningArgumentParser):
    """LightningCLI's parser; jsonargparse makes those of nested classes of this type too, so all follow its rules."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False, "exit_on_error": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an ArgumentError with the one line that helps."""
        parser = getattr(ex, "subcommand_parser", None) or self
        raise ArgumentError(None, one_line(message, [action.dest for action in parser._actions])) from ex


def one_line(message: str, options: Iterable[str]) -> str:
    """Reduce jsonargparse's report to the option, its value and the remedy.

    Example:
        >>> one_line("unrecognized arguments: --trainer.rounds 3", ["trainer.rounds_per_task"])
        'trainer.rounds is unknown: did you mean trainer.rounds_per_task?'
    """
    if found := UNRECOGNIZED.search(message) or UNKNOWN.search(message):
        groups = found.groupdict()
        return _unknown(".".join(filter(None, (groups.get("group"), groups["key"]))), options)
    if found := NO_SEED.search(message):
        return SEED_RULE.format(found[1])
    if found := REQUIRED.search(message):
        return f"option {found[1]} is missing: add --{found[1]} VALUE."
    if not (key := KEY.search(message)):
        return message
    if inner := INNER.search(message):
        path, reason = inner[1], " ".join(inner[2].split())
        if re.match(r"[\w.]+(=| is unknown)", reason):
            return f"{key[1]}.{reason.replace('did you mean ', f'did you mean {key[1]}.')}"
        return f"{key[1]}={path!r} cannot be used ({reason}): {_classes(path)}"
    if found := RESTRICTED.search(message):
        return f"{key[1]}={found[1]!r} does not fit: give a number {found[2].replace('v', '')}."
    value = VALUE.findall(message)
    given = value[-1] if value else ""
    if NO_CLASS.search(message):
        given = named[1] if (named := CLASS_PATH.search(given)) else given
        return f"{key[1]}={given!r} is unknown: {_classes(given)}"
    expected = [_plain(kind) for kind in EXPECTED.findall(message) if "NoneType" not in kind and "path but" not in kind]
    if nested := NESTED_VALUE.match(given):
        return f"{key[1]}.{nested[1]}={nested[2]!r} does not fit: give {' or '.join(expected)}."
    if expected and value:
        return f"{key[1]}={given!r} does not fit: give {' or '.join(expected)}."
    reason = " ".join(message.split(":", 1)[1].split())
    return reason if reason.startswith(f"{key[1]} must be ") else f"{key[1]}: {reason}"


def _unknown(name: str, options: Iterable[str]) -> str:
    name = name.removeprefix("--")
    if name == "class_path":
        return "class_path is unknown beside options: put these under init_args."
    near = difflib.get_close_matches(name, options, n=1)
    return f"{name} is unknown: {f'did you mean {near[0]}?' if near else '--help lists what there is.'}"


def _classes(given: str) -> str:
    names = {name.casefold(): name for name in methods.__all__}
    near = difflib.get_close_matches(given.rpartition(".")[2].casefold(), names, n=1)
    choices = ", ".join(methods.__all__)
    return f"did you mean {names[near[0]]}?" if near else f"choose from {choices}, or give module.Class."


def _plain(kind: str) -> str:
    """How a type reads to a user: int for <class 'int'>, the values of a Literal."""
    if literal := re.fullmatch(r"typing\.Literal\[(.+)\]", kind):
        return " or ".join(literal[1].split(", "))
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind).replace("Sequence", "list")
