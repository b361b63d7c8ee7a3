import pytest
import torch

from fedlscl.data import batches, load_images
from fedlscl.data.loader import standard


@pytest.fixture(scope="module")
def data():
    return load_images("fake", fake_classes=2, train_per_class=6, image_size=16)


def loader(data, seed=1, num_workers=0, augment="standard"):
    return batches(data, torch.arange(12), 5, True, torch.Generator().manual_seed(seed), num_workers, augment)


def test_an_image_is_a_shift_of_itself_or_of_its_mirror_with_repeated_edges(data):
    images = data.train_images
    kinds = set()
    for image, changed in zip(images, standard(images, 3), strict=True):
        padded = [torch.nn.functional.pad(x.float()[None], (2,) * 4, "replicate")[0] for x in (image, image.flip(2))]
        found = {
            (mirrored, dy, dx)
            for mirrored, x in enumerate(padded)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(x[:, dy : dy + 16, dx : dx + 16], changed.float())
        }
        assert len(found) == 1
        kinds |= found
    assert {mirrored for mirrored, _, _ in kinds} == {0, 1} and len(kinds) > 6
    assert standard(images, 3).dtype == torch.uint8


def test_order_labels_and_ids_are_those_without(data):
    for plain, changed in zip(loader(data, augment="none"), loader(data), strict=True):
        assert torch.equal(plain.ids, changed.ids) and torch.equal(plain.labels, changed.labels)
        assert not torch.equal(plain.images, changed.images)
        assert changed.augmented is True and plain.augmented is False


def test_the_seed_decides_every_pass_is_new_and_workers_change_nothing(data):
    def passes(**options):
        given = loader(data, **options)
        return [torch.cat([batch.images for batch in sorted(given, key=lambda b: b.ids.tolist())]) for _ in range(2)]

    first = passes()
    for other in (passes(), passes(num_workers=1)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({passes(seed=seed)[0].sum().item() for seed in range(3)} | {first[1].sum().item()}) > 2


def test_only_training_images_change(make_data):
    data = make_data(augment="standard")
    stream = data.stream(0)
    ids = stream.train_ids(0)
    assert all(batch.augmented for batch in stream.loader(ids, 4, shuffle=True))
    assert all(batch.augmented for batch in data.train_dataloader())
    for given in (stream.loader(ids, 4, shuffle=False), data.test_dataloader(), data.val_dataloader()):
        assert all(not batch.augmented and torch.equal(batch.images, data.fetch(batch.ids).images) for batch in given)
    assert not next(iter(make_data().train_dataloader())).augmented
