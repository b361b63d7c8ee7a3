import io
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from fedlscl.callbacks import Callback
from fedlscl.callbacks.progress import ProgressDisplay
from fedlscl.callbacks.results import Results
from fedlscl.callbacks.tensorboard import TensorBoard
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.methods import FedLSCL


class RunFolder(Callback):
    """Gives the run its folder, as the command line does."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_start(self, run):
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            (self.folder / "config.yaml").write_text("seed_everything: 42\n")
            run.run_dir = self.folder


class StopAt(Callback):
    """Interrupts the run at the start of a round."""

    def __init__(self, step):
        self.step = step

    def on_round_start(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


class Observed(NamedTuple):
    """A run with the built-in callbacks."""

    trainer: FederatedTrainer
    folder: Path | None
    screen: str


@pytest.fixture(scope="session")
def observe(make_data):
    """Fit with the built-in callbacks; ``stop_at`` interrupts at a step, ``resume`` continues from the checkpoint."""

    def run(method, folder=None, stop_at=None, resume=False, is_terminal=False, data=None, rounds_per_task=2):
        display, screen = ProgressDisplay(), io.StringIO()
        display.console = Console(file=screen, force_terminal=is_terminal, width=100)
        callbacks = [RunFolder(folder), Results(), TensorBoard(), display, StopAt(stop_at)]
        trainer = FederatedTrainer(rounds_per_task=rounds_per_task, accelerator="cpu", callbacks=callbacks)
        checkpoint = folder / "checkpoint.pt" if resume else None
        try:
            trainer.fit(method, data or make_data(), checkpoint=checkpoint)
        except KeyboardInterrupt:
            assert stop_at is not None
        return Observed(trainer, folder, screen.getvalue())

    return run


@pytest.fixture(scope="session")
def make_method(collaborator_config):
    """FedLSCL on tiny nets: two stages from the second task on."""
    return lambda: FedLSCL(collaborator=collaborator_config, local_epochs=1, batch_size=8)


@pytest.fixture(scope="session")
def whole(observe, make_method, tmp_path_factory):
    """Two tasks of two rounds without interruption."""
    return observe(make_method(), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def resumed(observe, make_method, tmp_path_factory):
    """The same run, interrupted in the second task's second round and resumed."""
    folder = tmp_path_factory.mktemp("resumed")
    stopped = observe(make_method(), folder, stop_at=3)
    return stopped, observe(make_method(), folder, resume=True)
