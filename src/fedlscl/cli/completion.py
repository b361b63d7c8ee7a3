"""``fedlscl completion bash|zsh``: the script that jsonargparse makes with shtab."""

import re

from jsonargparse import ActionConfigFile

from fedlscl.cli.app import Parser
from fedlscl.cli.commands import Commands
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method
from fedlscl.federated.trainer import FederatedTrainer

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
