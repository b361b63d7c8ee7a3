"""GLFC's objective and herding one sample and one class at a time, in Python's floats."""

import math


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def binary_cross_entropy(z, target):
    return -target * math.log(sigmoid(z)) - (1 - target) * math.log(1 - sigmoid(z))


def loss(logits, labels, columns, new=None, answers=None, old=()):
    """Half of compensation and half of relation, or compensation alone; ``answers`` are the old model's logits."""
    rows = logits.tolist()
    size = [abs(sigmoid(row[label]) - 1) for row, label in zip(rows, labels.tolist(), strict=True)]
    is_new = [new is None or label in new for label in labels.tolist()]
    compensation = relation = 0.0
    for i, (row, label) in enumerate(zip(rows, labels.tolist(), strict=True)):
        group = [size[j] for j in range(len(rows)) if is_new[j] == is_new[i]]
        weight = 1.0 if new is None else size[i] / (sum(group) / len(group))
        for c in columns:
            compensation += weight * binary_cross_entropy(row[c], float(c == label))
            if answers is not None:
                target = sigmoid(answers[i][c].item()) if c in old else float(c == label)
                relation += binary_cross_entropy(row[c], target)
    parts = len(rows) * len(columns)
    return compensation / parts if answers is None else (compensation / 2 + relation / 2) / parts


def herding(rows, count):
    """Each time the row that brings the mean of the chosen ones nearest to the mean of all."""
    width = range(len(rows[0]))
    mean = [sum(row[d] for row in rows) / len(rows) for d in width]
    chosen = []
    while len(chosen) < min(count, len(rows)):

        def distance(i):
            group = [rows[j] for j in [*chosen, i]]
            return sum((mean[d] - sum(row[d] for row in group) / len(group)) ** 2 for d in width)

        chosen.append(min((i for i in range(len(rows)) if i not in chosen), key=distance))
    return chosen
