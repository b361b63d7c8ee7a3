"""FederatedCLI: LightningCLI with a FederatedTrainer, a Method and the streams of tasks."""

import logging
import os
import sys
from typing import Any, cast

import yaml
from jsonargparse import Namespace, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fedlscl import __version__
from fedlscl.cli.commands import Commands
from fedlscl.cli.completion import print_completion
from fedlscl.cli.configuration import (
    load_yaml,
    named_method,
    seed,
    unused_batch_size,
    usable_method,
    with_flags,
    with_method_names,
    with_saved_config,
)
from fedlscl.cli.errors import brief_warnings
from fedlscl.cli.listing import print_methods
from fedlscl.cli.parser import Parser
from fedlscl.cli.paths import expand_paths, weights_found, with_expanded_paths
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method
from fedlscl.federated.trainer import FederatedTrainer

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
