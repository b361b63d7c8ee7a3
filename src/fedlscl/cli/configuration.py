"""What happens to a command line and its configuration before anything is made from them."""

import argparse
import importlib
from pathlib import Path

import yaml

from fedlscl import methods
from fedlscl.cli.runs import CONFIG, find_checkpoint

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
    names = {name.casefold(): name for name in methods.__all__}
    changed = list(arguments)
    for place, word in enumerate(arguments):
        option, is_joined, value = word.partition("=")
        if option in METHOD_OPTIONS and is_joined:
            changed[place] = f"{option}={names.get(value.casefold(), value)}"
        elif option in METHOD_OPTIONS and place + 1 < len(arguments):
            value = arguments[place + 1]
            changed[place + 1] = names.get(value.casefold(), value)
    return changed


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
    if name in methods.__all__:
        return f"fedlscl.methods.{name}"
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
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ValueError(f"config {file!r} cannot be read ({error.strerror}): give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or "not text"
        raise ValueError(f"config {file!r} is no valid YAML ({problem}{where}): correct it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {file!r} holds {type(content).__name__}: give groups such as 'trainer:' and 'data:'.")
