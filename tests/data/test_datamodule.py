import lightning as L
import pytest
import torch

from fedlscl.data import SpatialTemporalDataModule


def fake(**options):
    small = {"num_clients": 2, "num_tasks": 2, "private_classes": 3, "public_classes": 3, "fake_classes": 9}
    return SpatialTemporalDataModule(**({"dataset": "fake", "image_size": 4} | small | options))


def all_ids(loader):
    return sorted(torch.cat([batch.ids for batch in loader]).tolist())


def train_ids(datamodule):
    return [ids.tolist() for split in datamodule.splits for ids in split.train]


def test_a_stream_tells_what_a_client_meets():
    streams = fake()
    stream = streams.stream(1)
    assert stream.client == 1 and len(stream.split.classes) == 2
    classes = [stream.classes(task) for task in range(2)]
    assert classes[0].dtype == torch.int64 and len(classes[0]) == len(classes[1]) == 3
    assert torch.equal(stream.seen(0), classes[0])
    assert stream.seen(1).tolist() == sorted(torch.cat(classes).tolist())
    for task in range(2):
        batch = stream.fetch(stream.train_ids(task))
        assert torch.equal(batch.labels.unique(), classes[task])
        assert torch.equal(stream.class_counts(task), batch.labels.bincount(minlength=9))
        assert len(stream.test_ids(task)) == 30
        assert torch.equal(stream.fetch(stream.test_ids(task)).labels.unique(), classes[task])
        assert all_ids(stream.loader(stream.train_ids(task), 8, shuffle=True)) == stream.train_ids(task).tolist()


def test_dataloaders_pool_or_narrow():
    streams = fake()
    everything = all_ids(streams.train_dataloader())
    assert everything == list(range(180))  # 9 classes x 20, all used, each sample once
    assert all_ids(streams.test_dataloader()) == list(range(180, 270))
    places = [all_ids(streams.at(client, task).train_dataloader()) for client in range(2) for task in range(2)]
    assert sorted([id_ for ids in places for id_ in ids]) == everything
    assert all_ids(streams.at(1, None).train_dataloader()) == sorted(places[2] + places[3])
    assert all_ids(streams.at(1, 0).train_dataloader()) == places[2] == streams.stream(1).train_ids(0).tolist()
    assert all_ids(streams.at(1, 0).val_dataloader()) == streams.stream(1).test_ids(0).tolist()


def test_setup_is_lazy_and_done_once():
    streams = fake()
    assert "data" not in vars(streams)
    streams.setup("fit")
    data, splits = streams.data, streams.splits
    streams.prepare_data()
    streams.setup("test")
    assert streams.data is data and streams.splits is splits
    assert streams.num_classes == 9 and streams.class_names[8] == "fake8"


def test_the_seed_of_the_run_counts_unless_the_split_has_one():
    streams = fake()
    drawn = train_ids(streams)
    assert drawn == train_ids(fake(seed=42))
    streams.run_seed = 7
    assert train_ids(streams) == train_ids(fake(seed=7)) != drawn
    pinned = fake(seed=42)
    pinned.run_seed = 7
    assert train_ids(pinned) == drawn
    assert pinned.data.fingerprint == streams.data.fingerprint


def test_global_protocol_gives_all_clients_the_same_classes():
    streams = fake(protocol="global", private_classes=0, public_classes=8)
    assert streams.splits[0].classes == streams.splits[1].classes
    assert [len(task) for task in streams.splits[0].classes] == [4, 4]
    with pytest.raises(ValueError, match="private_classes must be 0 for protocol 'global', got 3"):
        fake(protocol="global").setup()


def test_a_client_without_samples_has_an_empty_loader():
    streams = fake(
        protocol="global", num_clients=12, private_classes=0, public_classes=2, train_per_class=2, dirichlet_alpha=0.1
    )
    empty = [stream for stream in map(streams.stream, range(12)) if len(stream.train_ids(0)) == 0]
    assert empty
    assert list(empty[0].loader(empty[0].train_ids(0), 8, shuffle=True)) == []
    assert list(streams.at(empty[0].client, 0).train_dataloader()) == []


def test_a_saved_split_replaces_the_draw(tmp_path):
    path = str(tmp_path / "split.json")
    streams = fake(seed=3)
    streams.save_manifest(path)
    again = fake(manifest=path, seed=99)
    assert train_ids(again) == train_ids(streams)
    again.save_manifest(str(tmp_path / "copy.json"))
    assert train_ids(fake(manifest=str(tmp_path / "copy.json"))) == train_ids(streams)
    with pytest.raises(ValueError, match="must have 3 clients x 2 tasks, got 2 clients x 2 tasks"):
        fake(manifest=path, num_clients=3).setup()
    with pytest.raises(ValueError, match="belongs to a data set with fingerprint"):
        fake(manifest=path, train_per_class=5).setup()


def test_a_client_or_task_out_of_range_is_refused():
    with pytest.raises(ValueError, match="client must be from 0 to 1, got 2"):
        fake().stream(2)
    with pytest.raises(ValueError, match="task must be from 0 to 1, got -1"):
        fake().at(0, -1)


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(48, 9)
        self.correct = []

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.layer(batch.images.flatten(1) / 255), batch.labels)

    def test_step(self, batch, index):
        self.correct += (self.layer(batch.images.flatten(1) / 255).argmax(1) == batch.labels).tolist()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


@pytest.mark.parametrize("place", [None, (0, 1)])
def test_a_stock_trainer_learns_from_it(place, tmp_path):
    streams = fake()
    datamodule = streams if place is None else streams.at(*place)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=6, enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    torch.manual_seed(0)
    module = Linear()
    trainer.fit(module, datamodule=datamodule)
    trainer.test(module, datamodule=datamodule, verbose=False)
    assert len(module.correct) == (90 if place is None else 30)
    assert sum(module.correct) / len(module.correct) > 0.9


def test_the_shared_setting_fits_real_cifar(cifar_root):
    split = {"num_clients": 5, "num_tasks": 5, "private_classes": 15, "public_classes": 25}
    streams = SpatialTemporalDataModule(dataset="cifar100_100x30.npz", root=str(cifar_root), **split)
    assert len(streams.splits) == 5
    assert all(len(task) == 8 for split in streams.splits for task in split.classes)
    assert len(all_ids(streams.train_dataloader())) == 10_000
    stream = streams.stream(0)
    assert stream.class_counts(0).sum() == len(stream.train_ids(0))
    assert len(stream.test_ids(0)) == 240


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_clients", [0, -1, 100_001, 10**30, 1.5, float("nan")]),
        ("num_tasks", [0, -1, 2.5]),
        ("private_classes", [-1, 0.5]),
        ("public_classes", [-1, float("nan")]),
        ("batch_size", [0, -1, 1.5]),
        ("num_workers", [-1, 257, 10**9]),
        ("image_size", [0, -5, 4097, 10**9]),
        ("train_per_class", [0, -1]),
        ("test_per_class", [0, -1]),
        ("fake_classes", [0, -1]),
        ("seed", [-1, -(2**40), 0.5]),
        ("dirichlet_alpha", [0, -1.0, float("nan"), float("inf"), 1e308]),
        ("protocol", ["globl", "Local"]),
        ("augment", ["standrad", None]),
    ],
)
def test_values_out_of_range_are_refused_when_given(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got ") as caught:
            fake(**{name: value})
        assert str(value) in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_does_not_suffice_is_called_by_its_name():
    with pytest.raises(ValueError, match=r"public class 'fake[0-8]' must have at least 2 train samples"):
        fake(train_per_class=1).setup()
