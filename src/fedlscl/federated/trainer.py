"""FederatedTrainer: Algorithm 1 of arXiv 2508.09489 on Lightning Fabric, over a pool of local or remote clients."""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.checkpoint import load_last_good, save_checkpoint
from fedlscl.federated.client import Client, ClientOffloader
from fedlscl.federated.engine import Engine, Precision, PrefixCache, Ranks, chosen_precision, connect
from fedlscl.federated.loggers import LoggerCallback
from fedlscl.federated.method import Method, Progress, Stage
from fedlscl.federated.metrics import AT_SERVER, AccuracyMatrix
from fedlscl.federated.payload import Payload, Upload, num_bytes
from fedlscl.federated.pool import ClientPool, LocalPool, TrainStage, Turn, seed_turn, seeded
from fedlscl.federated.readout import ReadoutConfig, check_readouts
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.validation import UploadValidator
from fedlscl.options import Count, Interval, NonNegative, Positive, Whole, check_options


@dataclass(kw_only=True, eq=False, repr=False)
class FederatedTrainer:
    """Trains a method over clients, tasks and rounds."""

    rounds_per_task: Count = 5
    """Communication rounds between two tasks (R; 5 in the paper)."""
    server_every: Literal["round", "task"] = "round"
    """Whether the server aggregates in every 'round', or once per 'task' (Algorithm 1 as printed)."""
    accelerator: str = "auto"
    """Hardware to train on, as in Fabric: auto, cpu, gpu, cuda, mps."""
    devices: Count = 1
    """Number of processes that the clients are distributed over, one device (or share of a CPU) each."""
    precision: Precision = "32-true"
    """32-true, bf16-mixed, or 16-mixed on CUDA; auto is bf16-mixed where the hardware has it."""
    deterministic: bool = False
    """On a GPU, use operations whose results repeat to the bit, where torch has them; slower."""
    cache_gb: NonNegative = 4.0
    """Memory for frozen ViT tokens, which are computed once per image; 0 disables the cache."""
    clients_gb: NonNegative = 16.0
    """Memory for idle clients; beyond it the least recently used ones are offloaded to disk."""
    checkpoint_every: Count = 1
    """Rounds between two checkpoints; the end of a task always writes one."""
    participation: Annotated[float, Interval("(0, 1]")] = 1.0
    """Fraction of the clients that are sampled in a round; at least one is."""
    failure_rate: Annotated[float, Interval("[0, 1)")] = 0.0
    """Probability that a sampled client fails in a round: it does not train and gets no response."""
    quorum: Whole = 1
    """Minimum number of uploads for a round to be aggregated; 0 skips the aggregation of an empty round."""
    max_norm_ratio: Annotated[float, Interval("[1, inf)")] | Literal[0] = 1000.0
    """Reject an uploaded tensor whose norm exceeds this multiple of the running median; 0 disables."""
    upload_gb: Positive = 1.0
    """Largest accepted upload."""
    max_tasks: Count | None = None
    """Stop after this many tasks; all if left out."""
    readouts: ReadoutConfig = field(default_factory=ReadoutConfig)
    """Closed-form classifiers on the features of any method, beside its own head."""
    default_root_dir: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Name of the run's folder; by default the method's name."""
    callbacks: Sequence[Callback] = ()
    """Further callbacks, called after the built-in ones."""
    loggers: Sequence[Logger] = ()
    """Lightning loggers, which get the same scalars as TensorBoard."""

    def __post_init__(self) -> None:
        check_options(self)
        self.precision = chosen_precision(self.precision, self.accelerator)
        self.callbacks = [*([LoggerCallback(self.loggers)] if self.loggers else []), *self.callbacks]
        self.run_dir: Path | None = None
        self.identity = ""

    def fit(
        self,
        method: Method,
        datamodule: SpatialTemporalDataModule,
        seed: int = 42,
        checkpoint: Path | None = None,
        identity: str = "",
        pool: ClientPool | None = None,
    ) -> AccuracyMatrix:
        """Train a copy of the method on all tasks of the data, or on the remaining ones of a checkpoint.

        ``identity`` is the fingerprint of the configuration, which a checkpoint must have, too. Without a pool the
        clients are simulated in this process.
        """
        self.setup(method, datamodule, seed, pool)
        self.identity = identity
        run = self.run
        if checkpoint is not None:
            run.progress = self.restore(checkpoint, identity)
        start = run.progress
        try:
            self._call("on_fit_start")
            run.run_dir = self.ranks.from_first(run.run_dir)
            for task in range(start.task, run.num_tasks):
                self._learn_task(task, start.round if task == start.task else 0)
            self.pool.finish(lambda: self.save(Progress(run.num_tasks, 0)))
            self._call("on_fit_end")
        except BaseException:
            self._call("on_exception")
            raise
        return run.matrix

    def setup(
        self, method: Method, datamodule: SpatialTemporalDataModule, seed: int, pool: ClientPool | None = None
    ) -> None:
        """Build Fabric, the run's state and the clients without training; the method is copied."""
        method = deepcopy(method)
        check_readouts(self.readouts, method)
        if method.masks_sums and (self.participation < 1 or self.failure_rate > 0):
            raise ValueError(
                "participation must be 1 and failure_rate 0 with secure_sum, whose masks cancel out only in the sum of "
                f"all clients, got {self.participation:g} and {self.failure_rate:g}."
            )
        datamodule.run_seed = seed
        if method.needs_public_images:
            check_public_images(method, datamodule)
            method.use_public_images(datamodule.public_images)
        if pool is None:
            datamodule.setup()
        engine = self.launch(datamodule if pool is None else None)
        self.ranks = Ranks(engine.fabric)
        self.pool = pool or LocalPool(datamodule, self.ranks, self._train, self._call)
        self.run = RunState(
            method=method,
            seed=seed,
            num_clients=datamodule.num_clients,
            num_tasks=self.count_tasks(datamodule),
            rounds_per_task=self.rounds_per_task,
            server_every=self.server_every,
            precision=self.precision,
            engine=engine,
            validator=UploadValidator(
                method, max_norm_ratio=self.max_norm_ratio, max_bytes=int(self.upload_gb * 2**30)
            ),
            readout_config=self.readouts,
            run_dir=self.run_dir,
        )
        self.pool.setup(self.run)

    def launch(self, datamodule: SpatialTemporalDataModule | None, folder: Path | None = None) -> Engine:
        """Launch Fabric; frozen ViT tokens of the data are cached, also in ``folder`` for later processes."""
        fabric = connect(self.accelerator, self.devices, self.precision, self.deterministic)
        cache = None
        if datamodule is not None:
            dtype = torch.float32 if self.precision == "32-true" else torch.bfloat16
            cache = PrefixCache(datamodule, self.cache_gb * 2**30, dtype, folder)
        return Engine(fabric, cache, offloader=ClientOffloader(self.clients_gb * 2**30))

    def count_tasks(self, datamodule: SpatialTemporalDataModule) -> int:
        """Number of tasks of a run: those of the streams, at most ``max_tasks``."""
        return min(datamodule.num_tasks, self.max_tasks or datamodule.num_tasks)

    def restore(self, path: Path, identity: str = "") -> Progress:
        """Restore from a checkpoint (after ``setup``); a prefix of the run's fingerprint is accepted as ``identity``.

        Returns the position of the next round.
        """
        state, run = load_last_good(path, identity), self.run
        progress = Progress(*state["progress"])
        run.method.load_state_dict(state["method"])
        run.validator.load_state_dict(state["validator"])
        run.matrix.values, run.traffic, run.history = state["matrix"], state["traffic"], state["history"]
        if "readouts" in state:
            run.readouts.load_state_dict(state["readouts"])
        self.pool.load_state_dict(state, progress)
        return progress

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; training resumes at ``progress``."""
        run = self.run
        if run.run_dir is None:
            return
        clients = self.pool.state_dict()
        if not self.ranks.is_first:
            return
        state = {
            "identity": self.identity,
            "progress": [progress.task, progress.round],
            "method": run.method.state_dict(),
            "validator": run.validator.state_dict(),
            **clients,
            "matrix": run.matrix.values,
            "traffic": run.traffic,
            "history": run.history,
            **({"readouts": run.readouts.state_dict()} if self.readouts.heads else {}),
        }
        save_checkpoint(run.run_dir / "checkpoint.pt", state)
        self._call("on_checkpoint")

    def _learn_task(self, task: int, first_round: int) -> None:
        self.run.progress = Progress(task, first_round)
        self.pool.begin_task(task, first_round)
        self._call("on_task_start")
        rounds, is_final = self.rounds_per_task, task == self.run.num_tasks - 1
        for round_ in range(first_round, rounds):
            is_last = round_ == rounds - 1
            self._round(Progress(task, round_, is_last, is_final))
            if not is_last and (round_ + 1) % self.checkpoint_every == 0:
                self.save(Progress(task, round_ + 1))
        self.run.progress = Progress(task, rounds - 1, True, is_final)
        if first_round < rounds:  # otherwise resumed after the end of the task, before its readouts
            self.pool.end_task(self.run.progress)
        if self.readouts.heads:
            self._solve_readouts()
        self._call("on_task_end")
        self.save(Progress(task + 1, 0))

    def _round(self, progress: Progress) -> None:
        run = self.run
        run.progress = progress
        run.participants = self.sample_clients(run.num_clients, run.seed, progress)
        self._call("on_round_start")
        aggregates = self.server_every == "round" or progress.last
        uploads = self.pool.train(progress, run.participants, with_uploads=aggregates)
        if aggregates:
            self._server_step(uploads)
        self._call("on_round_end")

    def sample_clients(self, num_clients: int, seed: int, progress: Progress) -> list[int]:
        """Sorted ids of the participants of a round, without those that fail, drawn from the run's seed alone.

        Example:
            >>> FederatedTrainer(participation=0.5).sample_clients(4, 42, Progress(0, 0))
            [1, 2]
        """
        generator = np.random.default_rng([seed, Turn.SAMPLING, progress.task, progress.round])
        sampled = generator.permutation(num_clients)[: max(1, round(self.participation * num_clients))]
        fails = generator.random(num_clients) < self.failure_rate
        return sorted(int(client) for client in sampled if not fails[client])

    def _server_step(self, uploads: list[Upload]) -> None:
        """Validate and count the uploads, train at the server where the method does, aggregate and respond."""
        run, progress = self.run, self.run.progress
        for upload in uploads:
            run.count("up", upload.client, upload.payload)
        uploads = run.validator.filter(uploads, progress)
        if len(uploads) < self.quorum:
            raise ValueError(
                f"quorum {self.quorum} is not met: {len(uploads)} of {run.num_clients} clients answered in task "
                f"{progress.task + 1}, round {progress.round + 1}; lower --trainer.quorum, or continue from the last "
                "checkpoint when more clients are available."
            )
        if not any(upload.num_samples for upload in uploads):
            return
        answers = self._aggregate(uploads)
        for client, answer in answers.items():
            run.count("down", client, answer)
        self.pool.download(progress, answers)

    def _aggregate(self, uploads: list[Upload]) -> dict[int, Payload]:
        """The server's responses, by client; the first process computes them and its method's state for all."""
        run, start = self.run, len(self.run.history)
        answers: dict[int, Payload] = {}
        if self.ranks.is_first:
            train_server(run.method, run.seed, uploads, run.progress, self._train)
            started = time.perf_counter()
            answers = aggregate(run.method, run.seed, uploads, run.progress)
            self._call("on_server_end", time.perf_counter() - started)
        if self.ranks.size > 1:
            result = (answers, run.method.state_dict(), run.history[start:])
            answers, state, run.history[start:] = self.ranks.from_first(result)
            run.method.load_state_dict(state)
        return answers

    def _solve_readouts(self) -> None:
        """Collect the clients' sums of features, solve the readouts' heads and let the clients evaluate them."""
        run, progress = self.run, self.run.progress
        position = Progress(progress.task, self.rounds_per_task)
        uploads = self.pool.readout_sums(progress, lambda: self.save(position))
        uploads = run.validator.filter(uploads, progress, run.readouts)
        answer = run.readouts.add(uploads, progress)
        if answer:
            run.readouts.traffic["down"][:, progress.task] += num_bytes(answer)
            self.pool.evaluate_readouts(progress, answer)

    def _train(self, client: Client | None, stage: Stage) -> None:
        run = self.run
        self._call("on_stage_start", client, stage)
        started = time.perf_counter()
        terms = run.engine.train(stage, lambda size: self._call("on_batch_end", client, size))
        seconds = time.perf_counter() - started
        position = {"task": run.progress.task, "round": run.progress.round}
        index = AT_SERVER if client is None else client.id
        run.history.append({**position, "client": index, "stage": stage.name, "terms": terms})
        self._call("on_stage_end", client, stage, terms, seconds)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks if self.ranks.is_first else ():
            getattr(callback, hook)(self.run, *args)

    @property
    def matrix(self) -> AccuracyMatrix:
        """Accuracies of the run."""
        return self.run.matrix

    @property
    def clients(self) -> list[Client]:
        """All clients of a simulation."""
        return self.run.clients

    @property
    def method(self) -> Method:
        """The run's copy of the method, with its server state."""
        return self.run.method


def check_public_images(method: Method, data: SpatialTemporalDataModule) -> None:
    """Raise a ValueError where a server has no labelled images to train on, or those that clients are evaluated on."""
    whose = f"{type(method).__name__} with these options, whose server trains on the validation images"
    if not data.validation_per_class:
        raise ValueError(f"validation_per_class must be >= 1 for {whose}, got 0.")
    if data.evaluate_on == "validation":
        raise ValueError(f"evaluate_on must be 'test' for {whose}, got 'validation'.")


def train_server(method: Method, seed: int, uploads: list[Upload], progress: Progress, train_stage: TrainStage) -> None:
    """Train the method's stages at the server, each from its own seed."""

    def seed_stage(number: int) -> None:
        seed_turn(seed, Turn.SERVER_TRAIN, *progress.position, *([number] if number else []))

    for stage in seeded(method.server_stages(uploads, progress), seed_stage):
        train_stage(None, stage)


def aggregate(method: Method, seed: int, uploads: list[Upload], progress: Progress) -> dict[int, Payload]:
    """The server's responses, by client."""
    seed_turn(seed, Turn.SERVER, *progress.position)
    answers = method.aggregate(uploads, progress)
    if len(answers) != len(uploads):
        raise ValueError(
            f"{type(method).__name__}.aggregate must return one answer for each of {len(uploads)} uploads, "
            f"got {len(answers)}: return them in the order of the uploads."
        )
    return {upload.client: answer for upload, answer in zip(uploads, answers, strict=True)}
