import pytest
import torch

from fedlscl.federated.method import Progress, federated_average
from fedlscl.federated.payload import Upload
from fedlscl.methods import FedAvg


def upload(client, counts, **tensors):
    return Upload(client=client, task=0, round=0, payload=tensors, class_counts=torch.tensor(counts))


@pytest.fixture
def uploads():
    """Class 0 is the first client's alone, class 1 is shared, class 2 is nobody's."""
    torch.manual_seed(0)
    return [
        upload(
            0, [6, 2, 0], **{"small.w": torch.randn(4), "head.weight": torch.randn(3, 2), "head.bias": torch.randn(3)}
        ),
        upload(
            1, [0, 4, 0], **{"small.w": torch.randn(4), "head.weight": torch.randn(3, 2), "head.bias": torch.randn(3)}
        ),
    ]


@pytest.mark.parametrize("head_aggregation", ["classwise", "average"])
def test_bodies_are_averaged_by_samples(uploads, head_aggregation):
    body = federated_average(uploads, head_aggregation)["small.w"]
    first, second = (each.payload["small.w"] for each in uploads)
    torch.testing.assert_close(body, (8 * first + 4 * second) / 12)


def test_heads_are_averaged_class_by_class(uploads):
    average = federated_average(uploads, "classwise")
    for name in ("head.weight", "head.bias"):
        first, second = (each.payload[name] for each in uploads)
        assert torch.equal(average[name][0], first[0])
        torch.testing.assert_close(average[name][1], (2 * first[1] + 4 * second[1]) / 6)
        torch.testing.assert_close(average[name][2], (first[2] + second[2]) / 2)


def test_heads_can_be_averaged_as_everything_else(uploads):
    average = federated_average(uploads, "average")
    for name in ("head.weight", "head.bias"):
        first, second = (each.payload[name] for each in uploads)
        torch.testing.assert_close(average[name], (8 * first + 4 * second) / 12)


def test_everybody_gets_the_average(uploads):
    answers = FedAvg().aggregate(uploads, Progress(0, 0))
    expected = federated_average(uploads, "classwise")
    assert len(answers) == 2
    for answer in answers:
        assert all(torch.equal(answer[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("field", "value", "rule"), [("lr", 0.0, "> 0"), ("local_epochs", 0, ">= 1"), ("batch_size", -1, ">= 1")]
)
def test_what_would_train_nothing_is_refused(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be {rule}, got {value}"):
        FedAvg(**{field: value})
