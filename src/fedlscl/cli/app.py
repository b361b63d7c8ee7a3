"""The command line over LightningCLI: parse, make trainer, method and datamodule, and run one command."""

import argparse
import difflib
import importlib
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import yaml
from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    Namespace,
    get_loader,
    set_loader,
    set_parsing_settings,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from fedlscl import __version__, methods
from fedlscl.cli import brief_warnings, expand_paths, weights_found, with_expanded_paths
from fedlscl.cli.commands import Commands
from fedlscl.cli.runs import CONFIG, find_checkpoint
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.report.table import markdown

RENAMED = {
    "data.concentration": "data.dirichlet_alpha",
    "trainer.norm_factor": "trainer.max_norm_ratio",
    "method.num_tasks": "data.num_tasks",
    "method.num_clients": "data.num_clients",
    "method.shrinkage": "trainer.readouts.shrinkage",
    "method.collaborator.block": "method.collaborator.blocks",
    "method.collaborator.analytic_weight": "trainer.readouts.heads",
    "method.collaborator.adapted_weight": "trainer.readouts.heads",
}
"""Options of earlier versions, for the message that names the new one."""
SIZED_BY_DATA = ("FedDualP", "FedMGP", "FedWeIT", "LoRM", "PILoRA")
"""Methods that once had options for the numbers of tasks and clients."""
DEFAULT_METHOD = "fedlscl.methods.FedLSCL"
METHOD_OPTIONS = ("--method", "--method.class_path", "--method.help")
OF_ONE_CALL = ("config", "ckpt_path", "dry_run")
"""Options that a saved configuration leaves out."""
SEED_RULE = "seed_everything must be a whole number from 0 to 4294967295, got {}."


def run(arguments: list[str]) -> None:
    """Run a command line whose first word is the command."""
    if arguments[0] == "methods":
        print_methods()
        return
    for name in ("lightning.fabric", "lightning.pytorch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # As with ``python -m``: a user's own classes may lie beside their configuration.
    sys.path.append(os.getcwd())
    try:
        with brief_warnings():
            if arguments[0] == "completion":
                print_completion(arguments[1:])
            elif arguments[0] == "doctor":
                from fedlscl.cli.doctor import doctor

                doctor(arguments[1:])
            else:
                FederatedCLI(arguments)
    finally:
        sys.path.pop()


class Experiment(NamedTuple):
    """What a configuration describes; no data is read and no net built yet."""

    trainer: FederatedTrainer
    method: Method
    datamodule: SpatialTemporalDataModule
    config: dict[str, Any]
    """The resolved configuration, with expanded paths."""
    text: str
    """The same in YAML, as given: config.yaml of a run."""


def build(options: Sequence[str]) -> Experiment:
    """Make trainer, method and datamodule from configuration files and options, as ``fedlscl fit`` does.

    Raises:
        ArgumentError: if an option is unknown or has a wrong type.
        ValueError: if a value is out of range.
    """
    return FederatedCLI(["fit", *options], run=False).experiment


class FederatedCLI(LightningCLI):
    """Groups ``trainer``, ``method`` and ``data``, and one seed; the commands are the methods of `Commands`."""

    def __init__(self, arguments: list[str], run: bool = True) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        set_loader("yaml", load_yaml, (yaml.YAMLError,))
        self.command, arguments = arguments[0], with_saved_config(with_expanded_paths(normalized(arguments)))
        # The default of another method would hand its own values to every option that both have.
        self.default_method = _importable(named_method(arguments)) or DEFAULT_METHOD
        usage = f"fedlscl {self.command} [--config FILE] [--GROUP.OPTION VALUE ...]"
        kwargs = {"usage": usage, "dump_header": [f"fedlscl=={__version__}"]}
        super().__init__(
            datamodule_class=SpatialTemporalDataModule,
            trainer_class=cast(Any, Commands),
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"prog": "fedlscl", **({self.command: kwargs} if run else kwargs)},
            args=arguments if run else arguments[1:],
            run=run,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:
        # Parsers of the other commands would take time.
        return {self.command: {"model", "datamodule"}}

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=Seed(), default=42, help="of the split and of training.")

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(FederatedTrainer, "trainer", sub_configs=True)
        parser.add_subclass_arguments(
            Method,
            "method",
            metavar="NAME",
            help="short name or module.Class; --method.help NAME lists its options, --method.OPTION sets one.",
        )
        parser.set_defaults({"method": {"class_path": self.default_method}})
        parser.add_class_arguments(SpatialTemporalDataModule, "data", sub_configs=True)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ArgumentError(None, of_method(str(error), self.default_method.rpartition(".")[2])) from error
        batch_size = self.config.get(self.command, self.config).data.batch_size
        if batch_size != 32 or any(word.partition("=")[0] == "--data.batch_size" for word in args):
            print(f"data.batch_size has no effect on {self.command}: set method.batch_size.", file=sys.stderr)

    @override
    def _parse_ckpt_path(self) -> None:
        """LightningCLI looks for hyper-parameters in the checkpoint here; ours are in config.yaml."""

    @override
    def instantiate_classes(self) -> None:
        parser, config = self._parser(self.subcommand), self.config.get(str(self.subcommand), self.config)
        given = Namespace({key: value for key, value in config.items() if key not in OF_ONE_CALL})
        # Saved as written, so that a configuration file serves on another machine, too.
        text = parser.dump(given, skip_unset=False)
        config = weights_found(expand_paths(config))
        made = parser.instantiate(config)
        self.config_init = Namespace({str(self.subcommand): made})
        self.experiment = Experiment(made.trainer, made.method, made.data, config.as_dict(), text)
        self.model, self.datamodule = made.method, made.data
        self.trainer = cast(Any, Commands(made.trainer, self.experiment.config, text))


# The words of a command line, before jsonargparse reads them.


def normalized(arguments: list[str]) -> list[str]:
    """Methods in any case, a class after ``--data.dataset``, and ``--dry_run`` without a value.

    Example:
        >>> normalized(["fit", "--method", "fedavg", "--method=LWF", "--method.lr", "1"])
        ['fit', '--method', 'FedAvg', '--method=LwF', '--method.lr', '1']
        >>> normalized(["fit", "--dry_run", "--data.dataset", "fedlscl.data.Fake"])
        ['fit', '--dry_run=true', '--data.dataset.class_path', 'fedlscl.data.Fake']
    """
    changed, before = [], ""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, is_joined, value = word.partition("=")
        if before in METHOD_OPTIONS:
            word = method_name(word)
        elif option in METHOD_OPTIONS and is_joined:
            word = f"{option}={method_name(value)}"
        elif word == "--dry_run" and following not in ("true", "false"):
            word = "--dry_run=true"
        elif option == "--data.dataset" and _importable(value if is_joined else following):
            word = f"--data.dataset.class_path{is_joined}{value}"
        changed.append(word)
        before = word
    return changed


def with_saved_config(arguments: list[str]) -> list[str]:
    """Check the configuration files; a command on a trained run takes the one beside its checkpoint by default.

    Raises:
        ValueError: if a file cannot be read, or there is no checkpoint.
    """
    known = _known(arguments)
    for file in known.config:
        check_config(file)
    if arguments[0] == "fit" or known.config or known.help:
        return arguments
    checkpoint = find_checkpoint(Path(known.root if known.ckpt_path == "last" else known.ckpt_path))
    saved = str(checkpoint.with_name(CONFIG))
    check_config(saved)
    return [arguments[0], "--config", saved, *arguments[1:], "--ckpt_path", str(checkpoint)]


def named_method(arguments: list[str]) -> str | None:
    """The method that a command line names last, or else a configuration file on it; None if neither does.

    Example:
        >>> named_method(["fit", "--method", "LwF", "--method.lr", "1", "--method=EWC"])
        'EWC'
    """
    known = _known(arguments)
    groups = [yaml.safe_load(Path(file).read_text()).get("method") for file in known.config] + [known.method]
    names = [group.get("class_path") if isinstance(group, dict) else group for group in groups]
    return next((name for name in reversed(names) if isinstance(name, str)), None)


def _known(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--ckpt_path", default="last")
    parser.add_argument("--trainer.default_root_dir", dest="root", default="runs")
    parser.add_argument("--method", "--method.class_path")
    return parser.parse_known_args(arguments[1:])[0]


def method_name(given: str) -> str:
    """The name of a public method in its own case; any other text unchanged."""
    return {name.casefold(): name for name in methods.__all__}.get(given.casefold(), given)


def _importable(name: str | None) -> str | None:
    """The import path of a class by its full name, or of a public method; None if there is no such class."""
    if (public := method_name(name or "")) in methods.__all__:
        return f"fedlscl.methods.{public}"
    module, _, attribute = (name or "").rpartition(".")
    try:
        return name if attribute != "npz" and hasattr(importlib.import_module(module), attribute) else None
    except (ImportError, ValueError):
        return None


# Configuration files.

YAML = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, with method names in any case and without options that the data decide."""
    value = YAML(text)
    group = value.get("method") if isinstance(value, dict) else None
    if isinstance(group, dict) and str(group.get("class_path")).split(".")[-1] in SIZED_BY_DATA:
        for options in (group, group.get("init_args") or {}):
            for name in {"num_tasks", "num_clients"} & set(options):
                warnings.warn(f"method.{name} is no longer an option: data.{name} is used.", stacklevel=1)
                del options[name]
    for holder, key in ((value, "method"), (group, "class_path"), (value, "class_path")):
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = method_name(holder[key])
    return value


class Seed:
    """Reads a seed of NumPy and torch, 0 to 2^32 - 1; a class, since --help shows a type by its representation."""

    __name__ = "seed"

    @override
    def __repr__(self) -> str:
        return "int"

    def __call__(self, given: Any) -> int:
        """The seed, or a ValueError with the rule."""
        text = str(given)
        if not text.isdecimal() or not text.isascii() or int(text) >= 2**32:
            raise ValueError(SEED_RULE.format(text))
        return int(text)


def check_config(file: str) -> None:
    """Check that a configuration file exists and is a YAML mapping without duplicate keys.

    Raises:
        ValueError: naming the file, and the line if there is one.
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
        raise ValueError(f"config {file!r} must be valid YAML, got an error ({problem}{where}): correct it.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"config {file!r} must have groups such as 'trainer:' and 'data:', got {kind}.")
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


# Errors of the parser, in one line.

UNKNOWN = re.compile(r"(?:unrecognized arguments: (?:--)?|(?:Option|accept option) ')(?P<key>[^\s='?]+)")
KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<reason>.+)', re.DOTALL)
INNER = re.compile(r"given class_path '([^']+)':\n(.+?)\s*(?:\n\s*- Expected|\n\s*Given value|$)", re.DOTALL)
EXPECTED = re.compile(r"Expected an? (?:typing\.Literal\[(.+?)\]|<class '(?:\w+\.)*(\w+)'>|(\S+?))(?=[.\s]|$)")
VALUE = re.compile(
    r"(?:Got value|Given value): (?:NestedArg\(key='([^']+)', val=)?(?:\{'class_path': )?'?(.*?)'?[)}]*$", re.M
)
UNTYPED = re.compile(r"Parameter '(\w+)' from '([\w.]+?)(?:\.__init__)?' does not specify a type")


class Parser(LightningArgumentParser):
    """LightningCLI's parser; jsonargparse makes those of nested classes of this type too, so all follow its rules."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False, "exit_on_error": False})

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        raise ArgumentError(None, one_line(message, [action.dest for action in parser._actions])) from ex


def one_line(message: str, options: Iterable[str]) -> str:
    """Reduce jsonargparse's report to the option, its value and the fix.

    Example:
        >>> one_line("unrecognized arguments: --trainer.rounds 3", ["trainer.rounds_per_task"])
        'trainer.rounds is unknown: did you mean trainer.rounds_per_task?'
        >>> one_line("unrecognized arguments: --data.concentration 1", [])
        'data.concentration was renamed: use data.dirichlet_alpha.'
    """
    if found := re.search(r"invalid seed value: '(.*)'$", message):
        return SEED_RULE.format(found[1])
    if found := re.search(r"arguments are required: (?:\w+\.)?([\w.]+)", message):
        return f"option {found[1]} is missing: add --{found[1]} VALUE."
    if found := UNTYPED.search(message):
        option = message.partition(":")[0].strip()
        return (
            f"{option}: argument {found[1]!r} of {found[2]!r} must have a type, got none: write {found[1]}: str, or so."
        )
    if found := UNKNOWN.search(message):
        return _unknown(found["key"], options)
    if not (found := KEY.match(message)):
        return message
    key, reason = found["key"], found["reason"]
    if inner := INNER.search(reason):
        path, why = inner[1], " ".join(inner[2].split())
        if option := re.match(r"([\w.]+) (is unknown|must be)", why):
            renamed = _renamed(f"{key}.{option[1]}")
            return renamed or f"{key}.{why.replace('did you mean ', f'did you mean {key}.')}"
        return f"{key}={path!r} cannot be used ({why}): {_classes(path)}"
    nested, value = (VALUE.findall(reason) or [("", "")])[-1]
    if "dot import path string" in reason or "does not correspond" in reason:
        return f"{key}={value!r} is unknown: {_classes(value)}"
    kinds = ["".join(found) for found in EXPECTED.findall(reason)]
    expected = [kind.replace(", ", " or ") for kind in kinds if kind not in ("NoneType", "path")]
    if expected and value:
        return f"{key}{'.' * bool(nested)}{nested} must be {' or '.join(expected)}, got {value!r}."
    reason = " ".join(reason.split())
    return reason if reason.startswith(f"{key} must be ") else f"{key}: {reason}"


def of_method(message: str, method: str) -> str:
    """Name the method that lacks an option: what is wrong may be the combination of files, not the spelling.

    Example:
        >>> of_method("method.rank is unknown: --help lists what there is.", "FedAvg")
        'method.rank is unknown to FedAvg: --method.help FedAvg lists what there is.'
    """
    if not re.match(r"method\.[\w.]+ is unknown: ", message):
        return message
    message = message.replace(" is unknown: ", f" is unknown to {method}: ", 1)
    return message.replace("--help lists", f"--method.help {method} lists")


def _unknown(name: str, options: Iterable[str]) -> str:
    if name == "class_path":
        return "class_path is unknown beside options: put these under init_args."
    options = list(options)
    near = [option for option in options if option.startswith(name)] or difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists what there is."
    return _renamed(name) or f"{name} is unknown: {hint}"


def _renamed(name: str) -> str | None:
    return f"{name} was renamed: use {RENAMED[name]}." if name in RENAMED else None


def _classes(given: str) -> str:
    names = {name.casefold(): name for name in methods.__all__}
    near = difflib.get_close_matches(given.rpartition(".")[2].casefold(), names, n=1)
    choices = ", ".join(methods.__all__)
    return f"did you mean {names[near[0]]}?" if near else f"choose from {choices}, or give module.Class."


# ``fedlscl completion`` and ``fedlscl methods``.

OTHERS = {"report": ["--out"], "methods": [], "doctor": ["--data_root", "--config"], "completion": []}
"""Options of the commands that are not methods of `Commands`."""


def print_completion(arguments: list[str]) -> None:
    """Print the script of a shell.

    Raises:
        ValueError: if the shell is not bash or zsh.
    """
    if arguments not in (["bash"], ["zsh"]):
        raise ValueError(f"completion must be of bash or zsh, got {' '.join(arguments)!r}.")
    parser = Parser(prog="fedlscl")
    commands = parser.add_subcommands()
    for name in ("fit", "validate", "test", "predict"):
        command = Parser()
        command.add_argument("-c", "--config", action=ActionConfigFile)
        command.add_argument("--seed_everything", type=int)
        command.add_class_arguments(FederatedTrainer, "trainer", skip={"callbacks"})
        command.add_subclass_arguments(Method, "method")
        # With every subclass of torch's Dataset, which a class may ask for, it would take minutes.
        command.add_class_arguments(SpatialTemporalDataModule, "data", skip={"dataset"})
        command.add_argument("--data.dataset")
        command.add_method_arguments(Commands, name, skip={"model", "datamodule"})
        commands.add_subcommand(name, command)
    for name, options in OTHERS.items():
        command = Parser()
        for option in options:
            command.add_argument(option)
        commands.add_subcommand(name, command)
    # Short names of methods, as everywhere.
    print(re.sub(r"fedlscl\.(methods\.)?(?=[A-Z])", "", parser.get_completion_script(f"shtab-{arguments[0]}")))


LIST_HEADER = ("method", "source", "what a client trains", "what it uploads")


def method_rows() -> list[list[str]]:
    """Name, source, what is trained and what is uploaded of every public method, in alphabetical order."""
    rows = []
    for name in methods.__all__:
        card = getattr(methods, name).card
        # An arXiv paper that was published nowhere else has its year as venue.
        source = f"{card.venue.removeprefix('arXiv ')}, arXiv {card.arxiv}" if card.arxiv else card.venue
        rows.append([name, source, card.trains, card.uploads])
    return rows


def print_methods() -> None:
    """Print the table to the terminal, or as Markdown if the output is redirected."""
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
