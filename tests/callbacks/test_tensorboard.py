import re
import time

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fedlscl.callbacks.tensorboard import matrix_figure
from fedlscl.federated.metrics import AccuracyMatrix
from tiny_methods import METHODS


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def points(events, tag):
    return [(point.step, point.value) for point in events.Scalars(tag)]


@pytest.fixture(scope="session")
def events(whole):
    return read(whole.folder)


def test_losses_are_at_the_step_of_their_round(events, whole):
    expected = [
        (2 * entry["task"] + entry["round"], pytest.approx(entry["terms"]["cross_entropy"], rel=1e-6))
        for entry in whole.trainer.run.history
        if entry["client"] == 1 and entry["stage"] == "collaborative"
    ]
    assert points(events, "train/client_1/collaborative/cross_entropy") == expected
    assert [step for step, _ in points(events, "loss/continual/lora")] == [2, 3]


def test_mean_loss_is_over_clients(events, whole):
    last = [entry["terms"]["loss"] for entry in whole.trainer.run.history[-4:] if entry["stage"] == "continual"]
    assert points(events, "loss/continual/loss")[-1] == (3, pytest.approx(sum(last) / 2, rel=1e-6))


def test_accuracies_are_at_the_last_step_of_their_task(events, whole):
    for mask in ("task_il", "class_il"):
        after = whole.trainer.matrix.of(mask)
        mean = after.nanmean(2)
        assert points(events, f"accuracy_{mask}/average") == [
            (1, pytest.approx(float(mean[:, 0].mean()))),
            (3, pytest.approx(float(mean[:, 1].mean()))),
        ]
        assert points(events, f"accuracy_{mask}/client_1")[-1] == (3, pytest.approx(float(mean[1, 1])))
        for name in ("current", "forgetting", "backward_transfer", "worst_client", "average_before_aggregation"):
            assert len(points(events, f"accuracy_{mask}/{name}")) == 2


def test_traffic_and_time_are_of_every_round(events, whole):
    sent = whole.trainer.run.traffic["up"].sum(0).flatten().tolist()
    assert points(events, "traffic/up_bytes") == list(enumerate(map(float, sent)))
    for tag in (
        "traffic/down_bytes",
        "seconds/collaborative",
        "seconds/server",
        "seconds/round",
        "speed/images_per_second",
    ):
        assert [step for step, _ in points(events, tag)] == [0, 1, 2, 3]


def test_matrix_is_a_picture_after_every_task(events):
    pictures = events.Images("accuracy_matrix")
    assert [picture.step for picture in pictures] == [1, 3]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG") and pictures[0].width > 500


def test_configuration_layout_and_hyperparameters_are_there(events):
    tensors = events.Tags()["tensors"]
    assert "custom_scalars__config__" in tensors
    assert b"seed_everything: 42" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    plugins = events.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(plugins)
    start, experiment = plugins["_hparams_/session_start_info"], plugins["_hparams_/experiment"]
    assert b"collaborator.foundation.name" in start and b"FedLSCL" in start
    assert b"accuracy_class_il/average" in experiment


def test_every_tag_is_in_a_group(events):
    tags = events.Tags()["scalars"]
    assert len(tags) > 30 and all("/" in tag for tag in tags)
    groups = {tag.split("/")[0] for tag in tags}
    assert groups == {
        "accuracy_class_il",
        "accuracy_task_il",
        "uploads",
        "loss",
        "memory",
        "seconds",
        "speed",
        "traffic",
        "train",
    }


def test_every_chart_of_the_layout_has_a_curve(events):
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert len(charts) == 13
    tags = events.Tags()["scalars"]
    for chart in charts:
        for pattern in chart.multiline.tag:
            # As TensorBoard does it: at the beginning of the tag.
            assert [tag for tag in tags if re.match(pattern, tag)], (chart.title, pattern)


def test_hyperparameters_stand_beside_final_accuracies(events, whole):
    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert start["method"].string_value == "FedLSCL" and start["batch_size"].number_value == 8
    assert start["balance"].string_value == "True"
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    shown = [metric.name.tag for metric in experiment.metric_infos]
    assert shown[:2] == ["accuracy_class_il/average", "accuracy_class_il/worst_client"]
    final = {tag: points(events, tag)[-1] for tag in shown}
    assert len(shown) == 12 and all(step == 3 for step, _ in final.values())
    assert final["accuracy_class_il/average"][1] == pytest.approx(
        float(whole.trainer.matrix.of("class_il")[:, 1].mean())
    )


def test_there_is_one_run(whole):
    assert [path.is_file() for path in (whole.folder / "tensorboard").iterdir()] == [True]


def test_a_resumed_run_has_every_point_once(events, resumed):
    again = read(resumed[1].folder)
    assert set(again.Tags()["scalars"]) == set(events.Tags()["scalars"])
    for tag in events.Tags()["scalars"]:
        if not tag.startswith(("seconds/", "speed/", "memory/")):
            assert points(again, tag) == points(events, tag)
    assert [picture.step for picture in again.Images("accuracy_matrix")] == [1, 3]
    assert len(again.Tensors("config/text_summary")) == 1


def test_points_of_a_lost_round_are_replaced(observe, make_method, tmp_path):
    stopped = observe(make_method(), tmp_path, stop_at=1)
    # The checkpoint stands at step 1; what an unlucky process wrote after it must vanish.
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(stopped.folder / "tensorboard", filename_suffix=".lost")
    writer.add_scalar("traffic/up_bytes", -1.0, 1)
    writer.close()
    # Files are read in the order of their names, which begin with the second.
    time.sleep(1)
    observe(make_method(), tmp_path, resume=True)
    values = points(read(tmp_path), "traffic/up_bytes")
    assert [step for step, _ in values] == [0, 1, 2, 3] and min(value for _, value in values) > 0


@pytest.mark.parametrize("num_tasks", [1, 5, 21])
def test_picture_of_an_unfinished_matrix_is_drawn(num_tasks):
    matrix = AccuracyMatrix(2, num_tasks)
    matrix.record("after", 0, 0, torch.rand(2, 1))
    canvas = FigureCanvasAgg(matrix_figure(matrix))
    canvas.draw()
    assert np.asarray(canvas.buffer_rgba()).std() > 1


def test_losses_of_the_server_have_a_place_of_their_own(observe, tmp_path):
    """On the screen, too: one line per kind of stage."""
    run = observe(METHODS["TARGET"](), tmp_path)
    events = read(tmp_path)
    last = [e for e in run.trainer.run.history if (e["client"], e["stage"]) == (-1, "synthesis")][-1]["terms"]["label"]
    assert points(events, "train/server/synthesis/label") == [(1, pytest.approx(last, rel=1e-6))]
    assert not [tag for tag in events.Tags()["scalars"] if "client_-1" in tag or tag.startswith("loss/synthesis")]
    assert len(points(events, "seconds/student")) == 1
    assert run.screen.count("server, synthesis: loss ") == run.screen.count("server, student: loss ") == 1
    assert "task 1/2, round 2/2, server, synthesis: loss" in run.screen and "client -1" not in run.screen
