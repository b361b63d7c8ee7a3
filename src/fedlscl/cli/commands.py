"""What the subcommands do."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlscl.cli.identity import identify, learned_part
from fedlscl.cli.predict import Predictor, image_files, write_csv
from fedlscl.cli.runs import RunDirectory, check_writable, find_checkpoint, last_checkpoint
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.callbacks import Callback
from fedlscl.federated.method import Method
from fedlscl.federated.metrics import MASKS
from fedlscl.federated.table import aligned, percent
from fedlscl.federated.trainer import FederatedTrainer


class Commands:
    """Runs a trainer in run directories.

    Args:
        trainer: as configured; its callbacks go after the built-in ones.
        config: the resolved configuration.
        text: what the run directory gets as config.yaml.
    """

    def __init__(self, trainer: FederatedTrainer, config: dict[str, Any], text: str) -> None:
        self.trainer, self.config, self.text = trainer, config, text
        self.seed: int = config["seed_everything"]

    def fit(
        self,
        model: Method,
        datamodule: SpatialTemporalDataModule,
        ckpt_path: str | None = None,
        dry_run: bool = False,
    ) -> None:
        """Learn all tasks.

        Args:
            model: the method, under LightningCLI's name for it.
            datamodule: the streams of tasks.
            ckpt_path: 'last' continues the newest run of this name, or begins if none has a checkpoint; a run
                directory or a checkpoint file continues that run.
            dry_run: only say what would be done, with bytes and time from a few timed steps; nothing is written.
        """
        folder = self._folder(model)
        check_writable(folder)
        identity = self._identity(datamodule)
        checkpoint = None
        if ckpt_path == "last":
            checkpoint = last_checkpoint(folder, identity)
            if checkpoint is None:
                print(f"No checkpoint to continue in {folder}: starting from the beginning.", flush=True)
        elif ckpt_path is not None:
            checkpoint = find_checkpoint(Path(ckpt_path))
        if dry_run:
            self._foretell(model, datamodule, checkpoint, identity)
            return
        directory = RunDirectory(folder, self.text, None if checkpoint is None else checkpoint.parent)
        self.trainer.callbacks = [directory, *observers(), *self.trainer.callbacks]
        try:
            self.trainer.fit(model, datamodule, self.seed, checkpoint, identity)
        except BaseException as error:
            is_kept = directory.discard()
            if isinstance(error, KeyboardInterrupt):
                hint = f"continue with --ckpt_path {directory.path}" if is_kept else "before the first checkpoint"
                raise KeyboardInterrupt(hint) from None
            raise
        finally:
            directory.release()

    def validate(self, model: Method, datamodule: SpatialTemporalDataModule, ckpt_path: str = "last") -> None:
        """Accuracies of a trained run on its held-out images, the same as test.

        Args:
            model: the method, under LightningCLI's name for it.
            datamodule: the streams of tasks.
            ckpt_path: 'last' (the newest run), a run directory or a checkpoint file; its config.yaml is taken where no
                --config is given.
        """
        self.test(model, datamodule, ckpt_path)

    def test(self, model: Method, datamodule: SpatialTemporalDataModule, ckpt_path: str = "last") -> None:
        """Accuracies of a trained run on its held-out images, per client and task, under both masks.

        Args:
            model: the method, under LightningCLI's name for it.
            datamodule: the streams of tasks.
            ckpt_path: 'last' (the newest run), a run directory or a checkpoint file; its config.yaml is taken where no
                --config is given.
        """
        checkpoint = self._trained(model, ckpt_path)
        identity = learned_part(self._identity(datamodule))
        self.trainer.setup(model, datamodule, self.seed)
        task = self.trainer.restore(checkpoint, identity).learned
        rows = []
        for client in self.trainer.clients:
            client.task = task
            rows.append(self.trainer.local.evaluate(client))
        print(f"{checkpoint}: accuracy in percent after {task + 1} of {self.trainer.num_tasks} tasks")
        print("\n".join(accuracy_table(torch.stack(rows))))

    def predict(
        self,
        model: Method,
        datamodule: SpatialTemporalDataModule,
        images: str,
        client: int = 0,
        ckpt_path: str = "last",
        out: str | None = None,
        top: int = 3,
    ) -> None:
        """Classes of image files by one client's trained net, as CSV: image, rank, class, probability.

        Args:
            model: the method, under LightningCLI's name for it.
            datamodule: the streams of tasks; not read.
            images: an image file, or a folder whose images, also in its sub-folders, are all read; if one cannot
                be read, it is named on stderr, the others are answered, and the exit status is 2.
            client: which client's net, counted from 0; the classes that it has seen compete.
            ckpt_path: 'last' (the newest run), a run directory or a checkpoint file; its config.yaml is taken where no
                --config is given.
            out: CSV file to write; printed where not given.
            top: how many classes of an image to list, best first.
        """
        if top < 1:
            raise ValueError(f"top={top} lists nothing: choose 1 or more.")
        files, checkpoint = image_files(Path(images)), self._trained(model, ckpt_path)
        predictor = Predictor(self.trainer, model, self.config, checkpoint, client)
        predictions = list(predictor.predict(files, top))
        for reason in predictor.unreadable:
            print(f"fedlscl: error: {' '.join(reason.split())}", file=sys.stderr)
        if predictions:
            write_csv(predictions, None if out is None else Path(out))
        if predictor.unreadable:
            raise SystemExit(2)

    def _foretell(
        self, model: Method, datamodule: SpatialTemporalDataModule, checkpoint: Path | None, identity: str
    ) -> None:
        from fedlscl.federated.forecast import forecast
        from fedlscl.federated.wording import in_all, introduction

        processes, self.trainer.devices = self.trainer.devices, 1
        self.trainer.setup(model, datamodule, self.seed)
        if checkpoint is not None:
            self.trainer.progress = self.trainer.restore(checkpoint, identity)
        print("\n".join(introduction(self.trainer)), flush=True)
        self.trainer.devices = processes
        print(in_all(*forecast(self.trainer, model, datamodule)))
        print("Dry run: nothing was written. Leave out --dry_run to begin.")

    def _folder(self, model: Method) -> Path:
        return Path(self.trainer.default_root_dir, self.trainer.name or type(model).__name__)

    def _identity(self, datamodule: SpatialTemporalDataModule) -> str:
        datamodule.run_seed = self.seed
        return identify(self.config, datamodule.data.fingerprint, datamodule.splits)

    def _trained(self, model: Method, ckpt_path: str) -> Path:
        return find_checkpoint(self._folder(model) if ckpt_path == "last" else Path(ckpt_path))


def observers() -> Sequence[Callback]:
    """The built-in ones."""
    from fedlscl.federated.progress import ProgressDisplay
    from fedlscl.federated.results import Results
    from fedlscl.federated.tensorboard import TensorBoard

    return Results(), TensorBoard(), ProgressDisplay()


def accuracy_table(values: Tensor) -> list[str]:
    """Lines for accuracies (clients, masks, tasks): each client's and their mean under both masks, in percent."""
    tasks = [f"task {task}" for task in range(1, values.shape[2] + 1)]
    rows = [["mask", "client", *tasks, "mean"]]
    for mask, of_mask in zip(MASKS, values.transpose(0, 1), strict=True):
        names = [*map(str, range(len(of_mask))), "mean"]
        for name, accuracies in zip(names, (*of_mask, of_mask.mean(0)), strict=True):
            rows.append([mask, name, *map(percent, accuracies.tolist()), percent(accuracies.mean().item())])
    return aligned(rows)
