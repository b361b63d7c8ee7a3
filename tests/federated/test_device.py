import pytest
import torch

from fedlscl.federated import engine as device
from fedlscl.federated.engine import chosen_precision, fast_bf16


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_takes_bf16_where_a_processor_has_instructions_for_it(fast, expected, monkeypatch):
    monkeypatch.setattr(device, "fast_bf16", lambda: fast)
    assert chosen_precision("auto", "cpu") == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_asks_the_gpu_where_there_is_one(supported, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: supported or including_emulation)
    monkeypatch.setattr(device, "fast_bf16", lambda: not supported)
    assert chosen_precision("auto", "auto") == chosen_precision("auto", "cuda") == expected
    assert chosen_precision("auto", "cpu") != expected


@pytest.mark.parametrize("named", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_named_precision_stays(named):
    assert chosen_precision(named, "cpu") == named


def test_processors_without_bf16_instructions_are_told_apart(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for avx, amx in [(False, False), (True, False), (False, True)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert fast_bf16() == (avx or amx)
