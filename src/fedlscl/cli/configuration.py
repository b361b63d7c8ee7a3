"""What happens to a command line and its configuration before anything is made from them."""

import argparse
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from fedlscl import methods
from fedlscl.cli.runs import CONFIG, find_checkpoint
from fedlscl.data import SpatialTemporalDataModule

SEED_RULE = "seed_everything must be a whole number from 0 to 4294967295, got {}."
YAML = get_loader("yaml")
BATCH_SIZE = inspect.signature(SpatialTemporalDataModule).parameters["batch_size"].default
METHOD_OPTIONS = ("--method", "--method.class_path", "--method.help")


def with_saved_config(arguments: list[str]) -> list[str]:
    """Check the configuration files; give a command on a trained run the one beside its checkpoint if it has none.

    Raises:
        ValueError: if a file cannot be read, or there is no checkpoint.
    """
    command, options = arguments[0], arguments[1:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--ckpt_path", default="last")
    parser.add_argument("--trainer.default_root_dir", dest="root", default="runs")
    known, _ = parser.parse_known_args(options)
    for file in known.config:
        check_config(file)
    if command == "fit" or known.config or known.help:
        return arguments
    checkpoint = find_checkpoint(Path(known.root if known.ckpt_path == "last" else known.ckpt_path))
    saved = str(checkpoint.with_name(CONFIG))
    check_config(saved)
    return [command, "--config", saved, *options, "--ckpt_path", str(checkpoint)]


def with_method_names(arguments: list[str]) -> list[str]:
    """Take the name of a public method in any case, as in ``--method fedavg``.

    Example:
        >>> with_method_names(["fit", "--method", "fedavg", "--method=LWF", "--method.lr", "1"])
        ['fit', '--method', 'FedAvg', '--method=LwF', '--method.lr', '1']
    """
    changed = list(arguments)
    for place, word in enumerate(arguments):
        option, is_joined, value = word.partition("=")
        if option in METHOD_OPTIONS and is_joined:
            changed[place] = f"{option}={method_name(value)}"
        elif option in METHOD_OPTIONS and place + 1 < len(arguments):
            changed[place + 1] = method_name(arguments[place + 1])
    return changed


def method_name(given: str) -> str:
    """A public method's name in its own case; any other text as it is."""
    return {name.casefold(): name for name in methods.__all__}.get(given.casefold(), given)


def load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, with names of public methods in any case."""
    value = YAML(text)
    group = value.get("method") if isinstance(value, dict) else None
    for holder, key in ((value, "method"), (group, "class_path"), (value, "class_path")):
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = method_name(holder[key])
    return value


def seed(given: Any) -> int:
    """A seed of NumPy and torch.

    Raises:
        ValueError: if it is not a whole number from 0 to 2^32 - 1.
    """
    text = str(given)
    if not text.isdecimal() or not text.isascii() or int(text) >= 2**32:
        raise ValueError(SEED_RULE.format(text))
    return int(text)


def unused_batch_size(arguments: list[str], batch_size: int) -> bool:
    """Whether data.batch_size was set, which only the plain dataloaders of the Python API use."""
    return batch_size != BATCH_SIZE or any(word.partition("=")[0] == "--data.batch_size" for word in arguments)


def with_flags(arguments: list[str]) -> list[str]:
    """Let ``--dry_run`` stand alone; jsonargparse wants a value after every option.

    Example:
        >>> with_flags(["fit", "--dry_run", "--config", "a.yaml"]), with_flags(["fit", "--dry_run", "false"])
        (['fit', '--dry_run=true', '--config', 'a.yaml'], ['fit', '--dry_run', 'false'])
    """
    stands_alone = [
        word == "--dry_run" and following not in ("true", "false")
        for word, following in zip(arguments, [*arguments[1:], ""], strict=True)
    ]
    return [f"{word}=true" if alone else word for word, alone in zip(arguments, stands_alone, strict=True)]


def named_method(arguments: list[str]) -> str | None:
    """The method that a command line names last, or else a configuration file on it; None where none does.

    Example:
        >>> named_method(["fit", "--method", "LwF", "--method.lr", "1", "--method=EWC"])
        'EWC'
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method", "--method.class_path", dest="name")
    parser.add_argument("-c", "--config", action="append", default=[])
    known, _ = parser.parse_known_args(arguments)
    if known.name is not None:
        return known.name
    groups = [yaml.safe_load(Path(file).read_text()).get("method") for file in known.config]
    names = [group.get("class_path") if isinstance(group, dict) else group for group in groups]
    return next((name for name in reversed(names) if isinstance(name, str)), None)


def usable_method(name: str | None) -> str | None:
    """The import path of a method by its short or full name; None where there is no such thing."""
    if (public := method_name(name or "")) in methods.__all__:
        return f"fedlscl.methods.{public}"
    module, _, attribute = (name or "").rpartition(".")
    try:
        return name if hasattr(importlib.import_module(module), attribute) else None
    except (ImportError, ValueError):
        return None


def check_config(file: str) -> None:
    """Refuse a configuration file that is missing or no mapping in YAML.

    Raises:
        ValueError: naming the file, and the line where there is one.
    """
    try:
        text = Path(file).read_text()
        content = yaml.safe_load(text)
        keys = list(_keys(yaml.compose(text, yaml.SafeLoader)))
    except OSError as error:
        raise ValueError(f"config {file!r} cannot be read ({error.strerror}): give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or "not text"
        raise ValueError(f"config {file!r} is no valid YAML ({problem}{where}): correct it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {file!r} holds {type(content).__name__}: give groups such as 'trainer:' and 'data:'.")
    for name, times in Counter(keys).items():
        if times > 1:
            raise ValueError(f"config {file!r} must have {name} once, got it {times} times: remove all but one.")
    if content.get("seed_everything", 0) is None:
        raise ValueError(SEED_RULE.format("null"))


def _keys(node: yaml.Node | None, name: str = "") -> Iterator[str]:
    """Dotted names of all keys; a group is no duplicate of its own dotted options, ``a: {b: 1}`` beside ``a.c: 2``."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{name}.{key.value}" if name else str(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                yield path
                yield from _keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _keys(value, f"{name}[{number}]")
