"""The command line over LightningCLI: parse, make trainer, method and datamodule, and run one command."""

import importlib
import logging
import os
import re
import sys
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
from fedlscl.cli import brief_warnings, did_you_mean, expand_paths
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
DEFAULT_METHOD = "fedlscl.methods.FedLSCL"
SHORT = {"-c": "--config", "-h": "--help"}
OF_ONE_CALL = ("config", "ckpt_path", "dry_run")
"""Options that a saved configuration leaves out."""


def run(arguments: list[str]) -> None:
    """Run a command line whose first word is the command."""
    for name in ("lightning.fabric", "lightning.pytorch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # As with ``python -m``: a user's own classes may lie beside their configuration.
    sys.path.append(os.getcwd())
    try:
        with brief_warnings():
            match arguments:
                case ["methods", *_]:
                    print_methods()
                case ["completion", *words]:
                    print_completion(words)
                case ["doctor", *words]:
                    from fedlscl.cli.doctor import doctor

                    doctor(words)
                case _:
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

    class Build(FederatedCLI):
        def fit(self, **options: Any) -> None:
            """Only made, not trained."""

    return Build(["fit", *options]).experiment


class FederatedCLI(LightningCLI):
    """Groups ``trainer``, ``method`` and ``data``, and one seed; the commands are the methods of `Commands`."""

    def __init__(self, arguments: list[str]) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        set_loader("yaml", load_yaml, (yaml.YAMLError,))
        self.command, options = arguments[0], with_saved_config(arguments[0], read_options(arguments[1:]))
        # The default of another method would hand its own values to every option that both have.
        self.default_method = importable(named_method(options)) or DEFAULT_METHOD
        usage = f"fedlscl {self.command} [--config FILE] [--GROUP.OPTION VALUE ...]"
        super().__init__(
            datamodule_class=SpatialTemporalDataModule,
            trainer_class=cast(Any, Commands),
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={self.command: {"usage": usage, "dump_header": [f"fedlscl=={__version__}"]}},
            args=[self.command, *(name if value is None else f"{name}={value}" for name, value in options)],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:
        # Parsers of the other commands would take time.
        return {self.command: {"model", "datamodule"}}

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=42, help="of the split and of training.")

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(FederatedTrainer, "trainer", sub_configs=True)
        about = "short name or module.Class; --method.help NAME lists its options, --method.OPTION sets one."
        parser.add_subclass_arguments(Method, "method", metavar="NAME", help=about, required=True)
        parser.set_defaults({"method": {"class_path": self.default_method}})
        parser.add_class_arguments(SpatialTemporalDataModule, "data", sub_configs=True)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            message, method = error.message, self.default_method.rpartition(".")[2]
            if (name := message.partition(" is unknown: ")[0]) in RENAMED:
                message = f"{name} was renamed: use {RENAMED[name]}."
            elif name.startswith("method."):  # a wrong combination of files, if not a wrong spelling
                message = message.replace(" is unknown: ", f" is unknown to {method}: ")
                message = message.replace("--help lists", f"--method.help {method} lists")
            raise ArgumentError(None, message) from error
        config = self.config[self.command]
        if not 0 <= config.seed_everything < 2**32:
            raise ValueError(f"seed_everything must be from 0 to 4294967295, got {config.seed_everything}.")
        if config.data.batch_size != 32 or any(word.startswith("--data.batch_size=") for word in args):
            print(f"data.batch_size has no effect on {self.command}: set method.batch_size.", file=sys.stderr)

    @override
    def _parse_ckpt_path(self) -> None:
        """LightningCLI looks for hyper-parameters in the checkpoint here; ours are in config.yaml."""

    @override
    def instantiate_classes(self) -> None:
        parser, config = self._parser(self.command), self.config[self.command]
        given = Namespace({key: value for key, value in config.items() if key not in OF_ONE_CALL})
        # Saved as written, so that a configuration file serves on another machine, too.
        text = parser.dump(given, skip_unset=False)
        config = weights_found(expand_paths(config))
        made = parser.instantiate(config)
        self.config_init = Namespace({self.command: made})
        self.experiment = Experiment(made.trainer, made.method, made.data, config.as_dict(), text)
        self.model, self.datamodule = made.method, made.data
        self.trainer = cast(Any, Commands(made.trainer, self.experiment.config, text))


def weights_found(config: Namespace) -> Namespace:
    """Look up weights files under data.root if they are not in the current directory."""
    found, root = config.clone(), config.data.root

    def look_up(value: Any) -> Any:
        if isinstance(value, list):
            return [look_up(file) for file in value]
        is_file_name = isinstance(value, str) and value not in ("", "timm", "bundled", "random")
        is_elsewhere = is_file_name and not Path(value).is_file() and Path(root, value).is_file()
        return str(Path(root, value)) if is_elsewhere else value

    for name, value in config.items():
        if root is not None and name.endswith((".weights", ".small_weights")):
            found[name] = look_up(value)
    return found


# The words of a command line, before jsonargparse reads them.

Option = tuple[str, str | None]
"""Name and value of an option, None if it has none; a word that belongs to no option is a name."""


def read_options(words: Iterable[str]) -> list[Option]:
    """The options of a command line: paths expanded, methods in any case, and a class after ``--data.dataset``.

    Example:
        >>> read_options(["-c", "a.yaml", "--method=fedprox", "--method.mu", "-1", "--dry_run"])
        [('--config', 'a.yaml'), ('--method', 'FedProx'), ('--method.mu', '-1'), ('--dry_run', 'true')]
        >>> os.environ["SCRATCH"] = "/scratch"
        >>> read_options(["--data.root", "$SCRATCH", "--method.lr=$1", "--data.dataset", "fedlscl.data.Fake"])
        [('--data.root', '/scratch'), ('--method.lr', '$1'), ('--data.dataset.class_path', 'fedlscl.data.Fake')]
    """
    given: list[Option] = []
    for word in words:
        name, is_joined, value = SHORT.get(word, word).partition("=")
        if name.startswith("--"):
            given.append((name, value if is_joined else None))
        elif given and given[-1][1] is None:
            given[-1] = (given[-1][0], word)
        else:
            given.append((word, None))
    options: list[Option] = []
    for name, value in given:
        if name == "--dry_run" and value is None:
            value = "true"
        elif name in ("--method", "--method.class_path", "--method.help") and value is not None:
            value = method_name(value)
        elif name == "--data.dataset" and importable(value):
            name = "--data.dataset.class_path"
        options.append((name, expand_paths(value, name[2:])))
    return options


def with_saved_config(command: str, options: list[Option]) -> list[Option]:
    """A command on a trained run takes the configuration beside its checkpoint if none is given."""
    given = dict(options)
    if command == "fit" or "--config" in given or "--help" in given:
        return options
    path = given.get("--ckpt_path") or "last"
    checkpoint = find_checkpoint(Path(path if path != "last" else given.get("--trainer.default_root_dir") or "runs"))
    return [("--config", str(checkpoint.with_name(CONFIG))), *options, ("--ckpt_path", str(checkpoint))]


def named_method(options: list[Option]) -> str | None:
    """The method that the options name last, or else their configuration files; None if neither does.

    Example:
        >>> named_method([("--method", "LwF"), ("--method.lr", "1"), ("--method", "EWC")])
        'EWC'
    """
    groups = [read_config(value).get("method") for name, value in options if name == "--config" and value is not None]
    groups += [value for name, value in options if name in ("--method", "--method.class_path")]
    names = [group.get("class_path") if isinstance(group, dict) else group for group in groups]
    return next((name for name in reversed(names) if isinstance(name, str)), None)


def method_name(given: str) -> str:
    """The name of a public method in its own case; any other text unchanged."""
    return {name.casefold(): name for name in methods.__all__}.get(given.casefold(), given)


def importable(name: str | None) -> str | None:
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
    """Load YAML as jsonargparse does, with method names in any case."""
    value = YAML(text)
    group = value.get("method") if isinstance(value, dict) else None
    for holder, key in ((value, "method"), (group, "class_path"), (value, "class_path")):
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = method_name(holder[key])
    return value


def read_config(file: str) -> dict[str, Any]:
    """A configuration file, which must be a YAML mapping without duplicate keys."""
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
    for group in ("trainer", "data"):
        if not isinstance(content.get(group, {}), dict | str):
            raise ValueError(f"config {file!r} must have options under '{group}:', got {content[group]}.")
    for name, times in Counter(keys).items():
        if times > 1:
            raise ValueError(f"config {file!r} must have {name} once, got it {times} times: remove all but one.")
    return content


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

REQUIRED = re.compile(r"arguments are required: (?:\w+\.)?([\w.]+)")
UNKNOWN = re.compile(r"(?:arguments: (?:--)?|^Option '|^Subcommand .*option '|^Group '(.+)' .*option ')([^\s=']+)")
KEY = re.compile(r'.*Parser key "([^"]+)":\s*(.+)', re.DOTALL)
UNTYPED = re.compile(r"Parameter '(\w+)' from '([\w.]+?)(?:\.__init__)?' does not specify a type")
PROBLEM = re.compile(r"given class_path '(.+)':\n\s*(.+)")
NO_CLASS = re.compile(r"(?:dot import path string:|Import path) (\S+)")
EXPECTED = re.compile(r"Expected a (?:typing\.Literal\[(.+?)\]|<class '(?:\w+\.)*(\w+)'>)")
VALUE = re.compile(r"(?:Got|Given) value: (.*)")


class Parser(LightningArgumentParser):
    """LightningCLI's parser; jsonargparse makes those of nested classes of this type too, so all follow its rules."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False, "exit_on_error": False})

    @override
    def validate(self, namespace: Namespace, skip_unset: bool = True, *args: Any, **kwargs: Any) -> None:
        super().validate(namespace, False, *args, **kwargs)  # null, too, must be of an option's type

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        raise ArgumentError(None, one_line(message, [action.dest for action in parser._actions])) from ex


def one_line(message: str, options: Iterable[str]) -> str:
    """Reduce jsonargparse's report to the option, its value and the fix; those of nested classes are one line already.

    Example:
        >>> one_line("unrecognized arguments: --trainer.rounds 3", ["trainer.rounds_per_task"])
        'trainer.rounds is unknown: did you mean trainer.rounds_per_task?'
    """
    missing = "{0} is missing: add --{0} VALUE."
    if found := REQUIRED.search(message):
        return missing.format(found[1])
    if found := UNKNOWN.search(message):
        name = ".".join(filter(None, found.groups()))
        if name == "class_path":
            return "class_path is unknown beside options: put these under init_args."
        longer = [option for option in options if option.startswith(name)]
        return f"{name} is unknown: {did_you_mean(name, longer or options, '--help lists what there is.')}"
    if not (found := KEY.match(message)):
        return message
    key, reason = found.groups()
    if found := UNTYPED.search(reason):
        name, owner = found.groups()
        return f"{key}: argument {name!r} of {owner!r} must have a type, got none: write {name}: str, or so."
    if found := PROBLEM.search(reason):
        path, why = found.groups()
        if re.match(r"[\w.]+( is | must be |=|: )", why):
            return re.sub("^|(?<=did you mean )|(?<=add --)", f"{key}.", why)
        return f"{key}={path!r} cannot be used ({why}): {class_hint(key, path)}"
    if found := NO_CLASS.search(reason):
        return f"{key}={found[1]!r} is unknown: {class_hint(key, found[1])}"
    found = [literals.replace(", ", " or ") or kind for literals, kind in EXPECTED.findall(reason)]
    kinds, values = [kind for kind in found if kind != "NoneType"], VALUE.findall(reason)
    if values[-1:] == ["None"]:
        return missing.format(key)
    if kinds and values:
        return f"{key} must be {' or '.join(kinds)}, got {values[-1]!r}."
    return f"{key}: {' '.join(reason.split())}"


def class_hint(key: str, given: str) -> str:
    """How to name a class for an option: a method in short, others by their module."""
    if key != "method":
        return "give module.Class."
    choices = f"choose from {', '.join(methods.__all__)}, or give module.Class."
    return did_you_mean(given.rpartition(".")[2], methods.__all__, choices)


# ``fedlscl completion`` and ``fedlscl methods``.


def print_completion(arguments: list[str]) -> None:
    """Print the script of a shell."""
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
    others = {"report": ["--out"], "methods": [], "doctor": ["--data_root", "--config"], "completion": []}
    for name, options in others.items():
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
    from rich.table import Column, Table

    first = Column(LIST_HEADER[0], no_wrap=True, style="bold")
    table = Table(first, *LIST_HEADER[1:], title="fedlscl fit --method NAME")
    for row in method_rows():
        table.add_row(*row)
    Console().print(table)
