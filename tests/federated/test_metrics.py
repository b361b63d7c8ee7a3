import pytest
import torch

from fedlscl.federated.metrics import (
    AccuracyMatrix,
    average_accuracy,
    backward_transfer,
    correct,
    current_accuracy,
    forgetting,
    plain,
    summary,
)

NAN = torch.nan
# Three clients, three tasks: row n is after task n, column t is on task t.
MATRIX = torch.tensor(
    [
        [[0.8, NAN, NAN], [0.6, 0.9, NAN], [0.5, 0.7, 1.0]],
        [[1.0, NAN, NAN], [1.0, 0.5, NAN], [0.9, 0.6, 0.4]],
        [[0.5, NAN, NAN], [0.9, 0.5, NAN], [0.7, 0.5, 0.5]],
    ],
    dtype=torch.float64,
)


def close(values, expected):
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_current_accuracy_is_the_diagonal():
    close(current_accuracy(MATRIX), [[0.8, 0.9, 1.0], [1.0, 0.5, 0.4], [0.5, 0.5, 0.5]])


def test_average_accuracy_is_over_the_tasks_so_far():
    close(average_accuracy(MATRIX), [[0.8, 0.75, 2.2 / 3], [1.0, 0.75, 1.9 / 3], [0.5, 0.7, 1.7 / 3]])


def test_forgetting_compares_with_the_best_earlier_accuracy():
    # Client 0 after task 3: ((0.8 - 0.5) + (0.9 - 0.7)) / 2; client 1: ((1.0 - 0.9) + (0.5 - 0.6)) / 2.
    # Client 2: its best on task 1 came after task 2, ((0.9 - 0.7) + (0.5 - 0.5)) / 2; after task 2, 0.5 - 0.9.
    close(forgetting(MATRIX), [[0, 0.2, 0.25], [0, 0.0, 0.0], [0, -0.4, 0.1]])


def test_backward_transfer_compares_with_the_accuracy_right_after_learning():
    # Client 2 after task 3: ((0.7 - 0.5) + (0.5 - 0.5)) / 2, although it forgot since task 2.
    close(backward_transfer(MATRIX), [[0, -0.2, -0.25], [0, 0.0, 0.0], [0, 0.4, 0.1]])


@pytest.fixture
def filled():
    matrix = AccuracyMatrix(num_clients=3, num_tasks=3)
    for client in range(3):
        for task in range(3):
            row = MATRIX[client, task, : task + 1]
            matrix.record("after", client, task, torch.stack([row, row / 2]))
            matrix.record("before", client, task, torch.stack([row - 0.1, row / 4]))
    return matrix


def test_summary_is_the_mean_over_clients_and_the_worst_client(filled):
    figures = summary(filled, 2)
    assert figures["task_il/average"] == pytest.approx((2.2 + 1.9 + 1.7) / 9)
    assert figures["task_il/worst_client"] == pytest.approx(1.7 / 3)
    assert figures["task_il/current"] == pytest.approx((1.0 + 0.4 + 0.5) / 3)
    assert figures["task_il/forgetting"] == pytest.approx(0.35 / 3)
    assert figures["task_il/backward_transfer"] == pytest.approx(-0.15 / 3)
    assert figures["task_il/average_before_aggregation"] == pytest.approx((2.2 + 1.9 + 1.7) / 9 - 0.1)
    assert figures["class_il/average"] == pytest.approx(figures["task_il/average"] / 2)
    assert figures["class_il/average_before_aggregation"] == pytest.approx(figures["task_il/average"] / 4)


def test_unmeasured_accuracies_are_none_in_json(filled):
    assert plain(filled.of("task_il").tolist())[0] == [[0.8, None, None], [0.6, 0.9, None], [0.5, 0.7, 1.0]]
    assert plain(AccuracyMatrix(1, 1).of("class_il", "before").tolist()) == [[[None]]]


def test_only_the_masked_classes_compete():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 0.0, 1.0]])
    labels = torch.tensor([3, 3])
    assert correct(logits, labels, torch.tensor([2, 3])).tolist() == [True, True]
    assert correct(logits, labels, torch.tensor([0, 2, 3])).tolist() == [True, False]
    assert correct(logits, labels, torch.tensor([0, 1, 2, 3])).tolist() == [False, False]
