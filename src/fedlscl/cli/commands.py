"""What the subcommands do."""

import csv
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedlscl.callbacks.formatting import LEGEND, MASK_NAMES, aligned, percent
from fedlscl.cli import runs
from fedlscl.data import Batch, SpatialTemporalDataModule
from fedlscl.data.images import ENDINGS, centre_crop, covering, find_images, read_image
from fedlscl.data.loader import check_integers
from fedlscl.data.split import preparation, read_manifest
from fedlscl.federated.checkpoint import load_last_good, write_atomically
from fedlscl.federated.engine import connect
from fedlscl.federated.method import Method, Progress, StreamShape
from fedlscl.federated.metrics import MASKS
from fedlscl.federated.pool import ClientRunner
from fedlscl.federated.readout import readout_logits
from fedlscl.federated.state import Callback
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.nets.net import Net

logger = logging.getLogger(__name__)

CHUNK = 64
"""Images per forward pass."""


class Predictor:
    """One client's net as a checkpoint holds it, with one of its classifiers.

    Args:
        commands: with the configuration of the checkpoint; their trainer gives device and precision.
        method: builds the net.
        checkpoint: file of a run, with manifest.json beside it.
        client: which client's net.
        readout: 'own' for the net's own head, or a readout such as 'adapted/lda'.
    """

    def __init__(self, commands: "Commands", method: Method, checkpoint: Path, client: int, readout: str) -> None:
        trainer, manifest = commands.trainer, read_manifest(checkpoint.with_name(runs.MANIFEST))
        splits, names = manifest.splits, manifest.class_names
        check_integers(0, len(splits) - 1, client=client)
        # Before the identity, which can only say that something differs: building says which file is missing.
        net = method.build_net(client, StreamShape(len(names), len(splits), len(splits[0].classes)))
        identity = runs.identify(commands.config, manifest.fingerprint, splits)
        state = load_last_good(checkpoint, runs.learned_part(identity))
        progress, saved = Progress(*state["progress"]), state["clients"][client]
        learned = progress.last_trained_task + 1
        if readout != "own" and progress.round:
            raise ValueError(
                f"readout must be own while task {learned} is not finished, got {readout!r}: its sums are taken at the "
                "end of a task; finish it with fit --ckpt_path."
            )
        heads: dict[str, dict[str, Tensor]] = saved.get("readouts", {})
        if readout not in ("own", *heads):
            hint = "" if heads else ": train with --trainer.readouts.heads for readouts"
            raise ValueError(f"readout must be one of {', '.join(['own', *heads])}, got {readout!r}{hint}.")
        self.prepared = preparation(manifest)
        self.fabric = connect(trainer.accelerator, 1, trainer.precision, trainer.deterministic)
        net.load_state_dict(saved["net"])
        self.net: Net = cast(Net, self.fabric.to_device(net)).eval()
        self.heads = {} if readout == "own" else {readout: self.fabric.to_device(heads[readout])}
        self.readouts = replace(trainer.readouts, features=(readout.rpartition("/")[0],)) if self.heads else None
        self.classes = sorted(label for task in splits[client].classes[:learned] for label in task)
        self.names = [names[label] for label in self.classes]
        self.num_reshaped = self.num_unreadable = 0

    def predict(self, files: list[Path], top: int) -> Iterator[tuple[str, int, str, str]]:
        """Image, rank, class and probability of the best ``top`` of the classes that the client has seen, by file.

        A file that cannot be read is counted and named on stderr.
        """
        for start in range(0, len(files), CHUNK):
            images = {}
            for file in files[start : start + CHUNK]:
                try:
                    images[file] = self.read(file)
                except ValueError as error:
                    self.num_unreadable += 1
                    print(f"fedlscl: error: {' '.join(str(error).split())}", file=sys.stderr)
            if not images:
                continue
            stacked = torch.from_numpy(np.stack(list(images.values())))
            values, ranked = self.probabilities(stacked).topk(min(top, len(self.names)))
            for file, row, labels in zip(images, values.tolist(), ranked.tolist(), strict=True):
                for rank, (probability, label) in enumerate(zip(row, labels, strict=True), start=1):
                    yield str(file), rank, self.names[label], f"{probability:.6f}"
        if self.num_reshaped:
            logger.warning(
                f"{self.num_reshaped} of {len(files)} images do not have the data set's aspect ratio, width x height = "
                f"{self.prepared.width} x {self.prepared.height}: only their centre was used"
            )

    def read(self, file: Path) -> np.ndarray:
        """An image (3, h, w) uint8, prepared like those of the data set."""
        image, (height, width, is_cropped) = read_image(file), self.prepared
        self.num_reshaped += not is_cropped and covering(image, height, width) != (width, height)
        return centre_crop(image, height, width)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities (B, classes seen) of stored images (B, 3, h, w), uint8."""
        stored = self.fabric.to_device(images)
        with self.fabric.autocast():
            if self.readouts is None:
                logits = self.net(stored).logits
            else:
                unknown = torch.zeros(len(stored), dtype=torch.int64, device=stored.device)
                views = self.readouts.views(self.net, Batch(stored, labels=unknown, ids=unknown))
                (logits,) = readout_logits(views, self.heads).values()
        return logits[:, self.classes].float().softmax(1).cpu()


def image_files(path: Path) -> list[Path]:
    """A file under any name, or all images below a folder in order, by the rules of `find_images`."""
    if path.is_file():
        return [path]
    files = find_images(path) if path.is_dir() else []
    if not files:
        what = "a folder without images" if path.is_dir() else "a path that does not exist"
        raise ValueError(f"images {str(path)!r} must be an image file or a folder of images ({ENDINGS}), got {what}.")
    return files


class Commands:
    """The subcommands: each runs a trainer in a run directory.

    Args:
        trainer: as configured; its callbacks go after the built-in ones.
        config: the resolved configuration.
        text: what the run directory gets as config.yaml.
    """

    def __init__(self, trainer: FederatedTrainer, config: dict[str, Any], text: str) -> None:
        self.trainer, self.config, self.text = trainer, config, text
        self.seed: int = config["seed_everything"]

    def fit(
        self, model: Method, datamodule: SpatialTemporalDataModule, ckpt_path: str | None = None, dry_run: bool = False
    ) -> None:
        """Train on all tasks.

        Args:
            model: the method.
            datamodule: the streams of tasks.
            ckpt_path: 'last' continues the newest run of this name, or starts one if none has a checkpoint; a run
                directory or a checkpoint file continues that run.
            dry_run: only estimate bytes and time, from a few timed steps; nothing is written.
        """
        folder = self._folder(model)
        runs.check_writable(folder)
        identity = self._identity(datamodule)
        checkpoint = None
        if ckpt_path == "last":
            checkpoint = runs.last_checkpoint(folder, identity)
            if checkpoint is None:
                print(f"No checkpoint to continue in {folder}: starting from the beginning.", flush=True)
        elif ckpt_path is not None:
            checkpoint = runs.find_checkpoint(Path(ckpt_path))
        if dry_run:
            self._forecast(model, datamodule, checkpoint, identity)
            return
        existing = None if checkpoint is None else checkpoint.parent
        with runs.RunDirectory(folder, self.text, datamodule.save_manifest, existing) as directory:
            self.trainer.callbacks = [directory, *observers(), *self.trainer.callbacks]
            self.trainer.fit(model, datamodule, self.seed, checkpoint, identity)

    def test(self, model: Method, datamodule: SpatialTemporalDataModule, ckpt_path: str = "last") -> None:
        """Accuracies of a trained run on its held-out images, per client and task, task- and class-incremental.

        Args:
            model: the method.
            datamodule: the streams of tasks.
            ckpt_path: 'last' (the newest run), a run directory or a checkpoint file; its config.yaml is used if no
                --config is given.
        """
        checkpoint = self._trained(model, ckpt_path)
        identity = runs.learned_part(self._identity(datamodule))
        self.trainer.devices = 1  # several processes would print the table several times
        self.trainer.setup(model, datamodule, self.seed)
        task = self.trainer.restore(checkpoint, identity).last_trained_task
        run, rows = self.trainer.run, []
        runner = ClientRunner(run.method, run.engine, run.seed, run.readout_config)
        for client in run.clients:
            client.task = task
            rows.append(runner.evaluate(client))
        images = f"{datamodule.evaluate_on} images"
        print(f"{checkpoint}: accuracy on {images} in percent after {task + 1} of {run.num_tasks} tasks")
        print("\n".join([*accuracy_table(torch.stack(rows)), "", LEGEND]))

    validate = test

    def predict(
        self,
        model: Method,
        datamodule: SpatialTemporalDataModule,
        images: str,
        client: int = 0,
        readout: str = "own",
        ckpt_path: str = "last",
        out: str | None = None,
        top: int = 3,
    ) -> None:
        """Classes of image files by one client's trained net, as CSV: image, rank, class, probability.

        Args:
            model: the method.
            datamodule: the streams of tasks; not loaded.
            images: an image file, or a folder with images, also in sub-folders; one that cannot be read is named on
                stderr, the others are classified, and the exit status is 2.
            client: which client's net, counted from 0; the classes that it has seen compete.
            readout: which classifier: 'own' for the method's head, or one of the run's readouts such as 'adapted/lda'.
            ckpt_path: 'last' (the newest run), a run directory or a checkpoint file; its config.yaml is used if no
                --config is given.
            out: CSV file to write; printed if left out.
            top: how many classes of an image to list, best first.
        """
        check_integers(1, top=top)
        files, checkpoint = image_files(Path(images)), self._trained(model, ckpt_path)
        predictor = Predictor(self, model, checkpoint, client, readout)
        rows = list(predictor.predict(files, top))
        if rows:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([("image", "rank", "class", "probability"), *rows])
            if out is None:
                sys.stdout.write(text.getvalue())
            else:
                write_atomically(Path(out), text.getvalue().encode())
        if predictor.num_unreadable:
            raise SystemExit(2)

    def _forecast(
        self, model: Method, datamodule: SpatialTemporalDataModule, checkpoint: Path | None, identity: str
    ) -> None:
        from fedlscl.callbacks.formatting import in_all, introduction
        from fedlscl.callbacks.progress import forecast

        processes, self.trainer.devices = self.trainer.devices, 1
        self.trainer.setup(model, datamodule, self.seed)
        if checkpoint is not None:
            self.trainer.run.progress = self.trainer.restore(checkpoint, identity)
        print("\n".join(introduction(self.trainer.run)), flush=True)
        self.trainer.devices = processes
        print(in_all(*forecast(self.trainer, model, datamodule, self.seed)))
        print("Dry run: nothing was written. Leave out --dry_run to begin.")

    def _folder(self, model: Method) -> Path:
        return Path(self.trainer.default_root_dir, self.trainer.name or type(model).__name__)

    def _identity(self, datamodule: SpatialTemporalDataModule) -> str:
        datamodule.run_seed = self.seed
        return runs.identify(self.config, datamodule.data.fingerprint, datamodule.splits)

    def _trained(self, model: Method, ckpt_path: str) -> Path:
        return runs.find_checkpoint(self._folder(model) if ckpt_path == "last" else Path(ckpt_path))


def observers() -> Sequence[Callback]:
    """The built-in callbacks; imported here, since only fit needs them."""
    from fedlscl.callbacks.progress import ProgressDisplay
    from fedlscl.callbacks.results import Results
    from fedlscl.callbacks.tensorboard import TensorBoard

    return Results(), TensorBoard(), ProgressDisplay()


def accuracy_table(values: Tensor) -> list[str]:
    """Lines for accuracies (clients, masks, tasks): each client's and their mean under both masks, in percent."""
    rows = [["", "client", *(f"task {task}" for task in range(1, values.shape[2] + 1)), "mean"]]
    names, values = [*map(str, range(len(values))), "mean"], torch.cat([values, values.mean(0, keepdim=True)])
    for index, mask in enumerate(MASKS):
        for name, accuracies in zip(names, values[:, index], strict=True):
            rows.append([MASK_NAMES[mask], name, *map(percent, [*accuracies.tolist(), accuracies.mean().item()])])
    return aligned(rows)
