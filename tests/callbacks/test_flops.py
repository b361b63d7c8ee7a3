from dataclasses import replace

import pytest
import torch

from fedlscl.callbacks.results import Flops, flops_by_client, flops_per_image
from fedlscl.nets.collaborator import Collaborator
from fedlscl.nets.net import SmallClassifier

TOKENS, WIDTH, DEPTH, PATCH = 5, 64, 6, 16
"""Of the tiny ViT: a class token and four patches of 16 pixels."""


def block(queries, others):
    """Forward FLOPs of a block in which so many tokens are asked for, and so many are read."""
    linear = 2 * WIDTH * WIDTH * (queries + 2 * others + queries + 2 * MLP * queries)
    return linear + 2 * 2 * queries * others * WIDTH


MLP = 3
"""Widths of the tiny ViT's hidden layer."""


def test_the_frozen_part_and_the_head_are_what_the_formula_says(collaborator_config):
    shape = replace(collaborator_config, collaboration=False)
    found = flops_per_image(Collaborator(shape, 6))
    embedding = 2 * (TOKENS - 1) * WIDTH * 3 * PATCH * PATCH
    assert found.frozen == embedding + DEPTH * block(TOKENS, TOKENS)
    head = 2 * WIDTH * 6
    assert found.inference == head and found.training >= 2 * head


def test_a_later_block_leaves_more_to_the_cache(collaborator_config):
    early, late = (flops_per_image(Collaborator(replace(collaborator_config, blocks=(index,)), 6)) for index in (1, 4))
    assert late.frozen > early.frozen and late.inference < early.inference and late.training < early.training
    assert early.training > 2 * early.inference


def test_a_net_without_a_frozen_part_has_none(collaborator_config):
    found = flops_per_image(SmallClassifier("test_resnet", 6, 16))
    assert found.frozen == 0 and 2 * found.inference < found.training < 3.5 * found.inference


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_no_trace(training, collaborator_config):
    net = Collaborator(collaborator_config, 6).train(training)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    flops_per_image(net)
    assert torch.equal(torch.get_rng_state(), state) and net.training is training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_results_have_them_for_every_client(whole):
    found = flops_by_client(whole.trainer.run)
    assert set(found) == set(Flops._fields)
    assert found["training"] == [flops_per_image(client.net).training for client in whole.trainer.clients]
