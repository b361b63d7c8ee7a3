"""FederatedCLI: LightningCLI with a FederatedTrainer, a Method and a SpatialTemporalDataModule."""

import argparse
import difflib
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fedlscl import __version__, methods
from fedlscl.cli.commands import Commands
from fedlscl.cli.completion import print_completion
from fedlscl.cli.errors import brief_warnings
from fedlscl.cli.paths import expand_paths, weights_found, with_expanded_paths
from fedlscl.cli.runs import CONFIG, find_checkpoint
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method, MethodCard
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.report.table import markdown

# A parser that takes no abbreviations and says in one line what is wrong.

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


# ``fedlscl methods``: what there is, in one line each, from the methods' own cards.

LIST_HEADER = ("method", "source", "what a client trains", "what it uploads")


def method_rows() -> list[list[str]]:
    """Name, source, what is trained and what is uploaded of every public method, in alphabetical order."""
    return [[name, *card_cells(getattr(methods, name).card)] for name in methods.__all__]


def card_cells(card: MethodCard) -> tuple[str, str, str]:
    """A card in three cells.

    Example:
        >>> card_cells(MethodCard("AISTATS 2017", "1602.05629", trains="everything", uploads="all of it"))
        ('AISTATS 2017, arXiv 1602.05629', 'everything', 'all of it')
    """
    # An arXiv paper that was published nowhere else has its year as venue.
    venue = card.venue.removeprefix("arXiv ") if card.arxiv else card.venue
    source = f"{venue}, arXiv {card.arxiv}" if card.arxiv else venue
    return source, card.trains, card.uploads


def print_methods() -> None:
    """Print the table to the terminal, or as Markdown where the output goes elsewhere."""
    if not sys.stdout.isatty():
        print(markdown([list(LIST_HEADER), *method_rows()], rule="---"))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fedlscl fit --method NAME")
    for number, column in enumerate(LIST_HEADER):
        table.add_column(column, no_wrap=number == 0, style="bold" if number == 0 else None)
    for row in method_rows():
        table.add_row(*row)
    Console().print(table)


# What happens to a command line and its configuration before anything is made from them.

SEED_RULE = "seed_everything must be a whole number from 0 to 4294967295, got {}."
YAML = get_loader("yaml")
BATCH_SIZE = inspect.signature(SpatialTemporalDataModule).parameters["batch_size"].default
SIZED_BY_DATA = ("FedDualP", "FedMGP", "FedWeIT", "LoRM", "PILoRA")
"""Methods that once had options for the numbers of tasks and clients."""
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
    """Load YAML as jsonargparse does, with names of public methods in any case, without options that the data set."""
    value = YAML(text)
    group = value.get("method") if isinstance(value, dict) else None
    if isinstance(group, dict) and str(group.get("class_path")).split(".")[-1] in SIZED_BY_DATA:
        for options in (group, group.get("init_args")):
            for name in {"num_tasks", "num_clients"} & set(options or ()):
                warnings.warn(f"method.{name} is no longer an option: data.{name} is used.", stacklevel=1)
                del options[name]
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


# FederatedCLI: LightningCLI with a FederatedTrainer, a Method and the streams of tasks.

DEFAULT_METHOD = "fedlscl.methods.FedLSCL"
HEADER = [f"fedlscl=={__version__}"]
OF_ONE_CALL = ("config", "ckpt_path", "dry_run")
"""Options that a saved configuration leaves out."""


def run(arguments: list[str]) -> None:
    """Run a command line whose first word is the command."""
    if arguments[0] == "methods":
        print_methods()
        return
    if arguments[0] == "completion":
        print_completion(arguments[1:])
        return
    for chatty in ("lightning.fabric", "lightning.pytorch", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", load_yaml, (yaml.YAMLError,))
    # Where ``python -m`` looks too: a method of one's own lies beside its configuration.
    sys.path.append(os.getcwd())
    try:
        with brief_warnings():
            if arguments[0] == "doctor":
                # Here, since it times products and looks into files.
                from fedlscl.cli.doctor import doctor

                doctor(arguments[1:])
                return
            FederatedCLI(with_flags(with_method_names(arguments)))
    finally:
        sys.path.pop()


class FederatedCLI(LightningCLI):
    """Groups ``trainer``, ``method`` and ``data``, and one seed; the commands are the methods of `Commands`."""

    def __init__(self, arguments: list[str]) -> None:
        self.command, arguments = arguments[0], with_saved_config(with_expanded_paths(arguments))
        # The default of another method would hand its own values to every option that both have.
        self.default_method = usable_method(named_method(arguments)) or DEFAULT_METHOD
        usage = f"fedlscl {self.command} [--config FILE] [--GROUP.OPTION VALUE ...]"
        super().__init__(
            datamodule_class=SpatialTemporalDataModule,
            trainer_class=cast(Any, Commands),
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"prog": "fedlscl", self.command: {"usage": usage, "dump_header": HEADER}},
            args=arguments,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """The command at hand, and which of its arguments are no options; parsers of the others would take time."""
        return {self.command: {"model", "datamodule"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything."""
        parser.add_argument("--seed_everything", type=seed, default=42, help="of the split and of training.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The three groups."""
        parser.add_class_arguments(FederatedTrainer, "trainer", sub_configs=True)
        parser.add_subclass_arguments(
            Method,
            "method",
            metavar="NAME",
            help="short name or module.Class; --method.help NAME lists its options, --method.OPTION sets one.",
        )
        parser.set_defaults({"method": {"class_path": self.default_method}})
        parser.add_class_arguments(SpatialTemporalDataModule, "data", sub_configs=True)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read configuration files and options."""
        self.config = parser.parse_args(args)
        if unused_batch_size(args, self.config[self.command].data.batch_size):
            print(f"data.batch_size has no effect on {self.command}: set method.batch_size.", file=sys.stderr)

    def _parse_ckpt_path(self) -> None:
        """LightningCLI looks for hyper-parameters in the checkpoint here; ours are in config.yaml."""

    def instantiate_classes(self) -> None:
        """Make trainer, method and datamodule; no data is read and no net built yet."""
        given = Namespace({key: value for key, value in self.config[self.command].items() if key not in OF_ONE_CALL})
        text = self._subcommand_parsers[self.command].dump(given, skip_unset=False)
        # Saved as written, so that a configuration file serves on another machine, too.
        config = weights_found(expand_paths(self.config[self.command]))
        self.config_init = self.parser.instantiate(Namespace({**self.config, self.command: config}))
        made = self.config_init[self.command]
        self.model, self.datamodule = made.method, made.data
        self.trainer = Commands(made.trainer, config.as_dict(), text)
