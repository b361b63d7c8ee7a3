import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin

import tiny
from fedlscl.__main__ import main
from fedlscl.callbacks.tensorboard import FeatureProjector

CALLBACK = "[{class_path: fedlscl.callbacks.tensorboard.FeatureProjector, init_args: {per_class: 2}}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The TensorBoard folder of a run with the projector on."""
    root = tmp_path_factory.mktemp("runs")
    assert main(["fit", *tiny.FEDLSCL, *tiny.inside(root), "--trainer.callbacks", CALLBACK]) == 0
    return root / "FedLSCL/version_0/tensorboard"


def test_every_point_has_its_class_client_and_task(folder):
    points = [list(map(float, line.split("\t"))) for line in (folder / "features.tsv").read_text().splitlines()]
    header, *labels = [line.split("\t") for line in (folder / "metadata.tsv").read_text().splitlines()]
    assert header == ["class", "client", "task"]
    # 2 clients x 2 tasks x 2 classes x 2 images, E of 16 numbers and unit norm.
    assert len(points) == len(labels) == 16 and {len(point) for point in points} == {16}
    assert torch.tensor(points).norm(dim=1).allclose(torch.ones(16), atol=1e-3)
    assert {(client, task) for _, client, task in labels} == {(c, t) for c in "01" for t in "12"}
    assert all(name.startswith("fake") for name, _, _ in labels)


def test_tensorboard_finds_them(folder):
    """By its own projector."""
    context = TBContext(logdir=str(folder.parent), multiplexer=EventMultiplexer(), data_provider=None)
    plugin = ProjectorPlugin(context)
    configs = plugin._read_latest_config_files([("tensorboard", str(folder))])[0]
    (embedding,) = configs["tensorboard"].embeddings
    assert (embedding.tensor_path, embedding.metadata_path) == ("features.tsv", "metadata.tsv")


def test_it_is_off_unless_asked_for(whole):
    assert not list(whole.folder.rglob("projector_config.pbtxt"))


def test_what_cannot_be_shown_is_refused_before_training(tmp_path, capsys):
    with pytest.raises(ValueError, match="per_class must be >= 1, got 0"):
        FeatureProjector(per_class=0)
    wrong = CALLBACK.replace("per_class: 2", "pick: embedding")
    assert main(["fit", *tiny.FEDLSCL, *tiny.inside(tmp_path), "--trainer.callbacks", wrong]) == 2
    assert "pick must be one of features, logits, lora, tokens, " in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == []
