"""Scalars in Lightning loggers: those of TensorBoard, once per step."""

import csv

import pytest
from lightning.fabric.loggers import CSVLogger as FabricCSVLogger
from lightning.fabric.loggers import Logger
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from fedlscl.__main__ import main
from fedlscl.callbacks import Callback
from fedlscl.callbacks.tensorboard import TensorBoard
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.methods import FedAvg

MEASURED = ("seconds/", "speed/", "memory/")


class ListLogger(Logger):
    """A user's own logger."""

    name, version = "list", 0

    def __init__(self):
        self.hyperparameters, self.metrics, self.status = [], [], []

    def log_hyperparams(self, params):
        self.hyperparameters.append(params)

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def finalize(self, status):
        self.status.append(status)


class StopAt(Callback):
    """Interrupts the run at the end of a round, before its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_round_end(self, run):
        if run.step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def fit(foundation_config, make_data):
    def run(folder, *loggers, callbacks=(), checkpoint=None):
        trainer = FederatedTrainer(
            rounds_per_task=2, accelerator="cpu", callbacks=list(callbacks), loggers=list(loggers)
        )
        trainer.run_dir = folder
        trainer.fit(FedAvg(foundation=foundation_config, local_epochs=1), make_data(), checkpoint=checkpoint)

    return run


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_users_logger_gets_every_step_once_and_the_hyperparameters(fit, has_folder, tmp_path):
    logger = ListLogger()
    fit(tmp_path if has_folder else None, logger)
    assert [step for step, _ in logger.metrics] == [0, 1, 2, 3]
    assert [("accuracy_class_il/average" in values) for _, values in logger.metrics] == [False, True, False, True]
    assert all(
        {"loss/train/loss", "traffic/up_bytes", "seconds/round"} <= values.keys() for _, values in logger.metrics
    )
    (hyperparameters,) = logger.hyperparameters
    assert hyperparameters["method"] == "FedAvg" and hyperparameters["foundation.name"] == "test_vit"
    assert logger.status == ["success"]


def test_loggers_and_tensorboard_have_the_same_scalars(fit, tmp_path):
    logger = ListLogger()
    fit(tmp_path, logger, callbacks=[TensorBoard()])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = {name for _, values in logger.metrics for name in values}
    assert tags == set(events.Tags()["scalars"])
    for tag in tags:
        points = [(step, pytest.approx(values[tag])) for step, values in logger.metrics if tag in values]
        if not tag.startswith(MEASURED):
            assert [(point.step, point.value) for point in events.Scalars(tag)] == points


def test_a_resumed_run_repeats_no_step(fit, tmp_path):
    first, second = ListLogger(), ListLogger()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, first, callbacks=[StopAt(2)])
    fit(tmp_path, second, checkpoint=tmp_path / "checkpoint.pt")
    assert [[step for step, _ in logger.metrics] for logger in (first, second)] == [[0, 1], [2, 3]]
    assert first.status == ["failed"]


def test_csv_loggers_write_their_files(fit, tmp_path):
    loggers = CSVLogger(tmp_path, "pytorch"), FabricCSVLogger(tmp_path, "fabric")
    fit(None, *loggers)
    for logger in loggers:
        with (tmp_path / logger.name / "version_0/metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
        assert float(rows[3]["accuracy_class_il/average"]) >= 0 and rows[2]["accuracy_class_il/average"] == ""
    assert "method: FedAvg" in (tmp_path / "pytorch/version_0/hparams.yaml").read_text()


def test_a_configuration_names_loggers_by_class_path(tmp_path):
    loggers = f"[{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path / 'logs'}}}}}]"
    assert main(["fit", *tiny.FEDAVG, *tiny.inside(tmp_path), "--trainer.loggers", loggers]) == 0
    assert "loss/train/loss" in (tmp_path / "logs/lightning_logs/version_0/metrics.csv").read_text()
    assert "CSVLogger" in (tmp_path / "FedAvg/version_0/config.yaml").read_text()
