import pytest

from fedlscl.data.images import names_hash
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.flower.federation import Federation
from fedlscl.flower.server import Description, FlowerPool, check_classes, parse_description
from tiny_methods import METHODS


def description(*names):
    return Description(len(names), "f" * 64, names_hash(names), [0], 4, 2)


AB, BA, ABC = description("a", "b"), description("b", "a"), description("a", "b", "c")


@pytest.fixture
def pool(make_data):
    return FlowerPool(Federation(METHODS["FedAvg"](), make_data(), FederatedTrainer(accelerator="cpu"), 42, "id"), None)


@pytest.mark.parametrize(
    ("said", "expected"),
    [([AB], AB), ([BA, AB, AB], AB), ([ABC, AB, BA, ABC], ABC), ([AB, BA], AB), ([BA, AB], BA), ([], None)],
)
def test_most_clients_decide_and_the_lowest_in_a_tie(pool, said, expected):
    assert pool._reference(said) == expected


def test_what_was_accepted_first_stays(pool):
    pool.descriptions[1][0] = BA
    assert pool._reference([AB, AB, AB]) == BA and pool.stream.num_classes == 2
    assert pool._reference([AB]) == BA


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (BA, "class_names must have the hash .* of the other nodes, got .*: give every node the same classes"),
        (description("a", "melanoma"), "class_names must have the hash"),
        (description("a", "B"), "class_names must have the hash"),
        (ABC, "num_classes must be 2 as on the other nodes, got 3: give every node the same classes"),
    ],
)
def test_other_classes_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        check_classes(found, AB)


def test_unicode_form_and_trailing_space_are_accepted():
    check_classes(description("e\u0301", "b "), description("\u00e9", "b"))


@pytest.mark.parametrize(
    "changed",
    [{"class_names": None}, {"class_names": "a" * 63}, {"class_names": ["a"]}, {"fingerprint": 3}, {"classes": [2]}],
)
def test_a_malformed_description_is_refused(changed):
    assert parse_description(AB._asdict()) == AB
    with pytest.raises(ValueError, match=r"malformed: use the same version|classes that its data set does not have"):
        parse_description(AB._asdict() | changed)
