from copy import deepcopy

import pytest
import torch

from fedlscl.federated.compilation import compile_small_models
from fedlscl.nets.cnn import SmallClassifier


@pytest.fixture
def compiled(monkeypatch):
    """What was given to the compiler, which takes functions as they are."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(function) or function)
    return given


@pytest.mark.parametrize(("choice", "times"), [("on", 1), ("off", 0), ("auto", 0)])
def test_small_models_are_compiled_once_and_only_on_request(choice, times, compiled):
    net = SmallClassifier("test_resnet", 3, 16)
    for _ in range(2):
        compile_small_models(net, choice)
    assert len(compiled) == times


def test_weights_outputs_and_copies_are_those_without(compiled):
    net = SmallClassifier("test_resnet", 3, 16).eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    names, logits = list(net.state_dict()), net(images).logits
    compile_small_models(net, "on")
    assert list(net.state_dict()) == names and torch.equal(net(images).logits, logits)
    copy = deepcopy(net)
    with torch.no_grad():
        copy.small.cnn.get_parameter(next(name for name, _ in copy.small.cnn.named_parameters())).zero_()
    assert not torch.equal(copy(images).logits, logits) and torch.equal(net(images).logits, logits)
    assert len(compiled) == 1
