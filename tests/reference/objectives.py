"""Eq. 3 and Eq. 4 as they are written, sample by sample in Python's floats."""

import math


def eq3(logits, labels, classes):
    """Mean over the samples of -log softmax of the label among ``classes``."""
    losses = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        losses.append(math.log(sum(math.exp(row[c]) for c in classes)) - row[label])
    return sum(losses) / len(losses)


def squared_distance(left, right):
    """||left - right||^2 of two lists."""
    return sum((a - b) ** 2 for a, b in zip(left, right, strict=True))


def eq4(now, previous, labels, classes, lambda_features, lambda_lora):
    """Cross-entropy + lambda_E ||E - E'||^2 + lambda_W ||W - W'||^2; ``now`` has logits, features and lora."""
    features = [squared_distance(*pair) for pair in zip(now.features.tolist(), previous.features.tolist(), strict=True)]
    lora = [squared_distance(*pair) for pair in zip(now.lora.tolist(), previous.lora.tolist(), strict=True)]
    return (
        eq3(now.logits, labels, classes)
        + lambda_features * sum(features) / len(features)
        + lambda_lora * sum(lora) / len(lora)
    )
