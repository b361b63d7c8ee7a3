import json

import pytest
import torch

from fedlscl.federated.results import write_results
from tiny_methods import METHODS

ALL = sorted(set(METHODS) - {"Joint", "JointLSCL"})


def values(knowledge_or_trainer):
    return knowledge_or_trainer.matrix.values.nan_to_num(-1)


def same_run(coordinator, trainer):
    """All that the server knows is what the simulation knows, to the bit."""
    knowledge = coordinator.knowledge
    assert torch.equal(values(knowledge), values(trainer))
    assert all(torch.equal(knowledge.traffic[name], trainer.traffic[name]) for name in trainer.traffic)


def same_files(coordinator, trainer):
    """Results as ``fedlscl fit`` writes them; what is trained at the moment is known to the nodes alone."""
    trainer.run_dir = coordinator.run_dir / "simulated"
    trainer.run_dir.mkdir()
    write_results(trainer)
    assert (trainer.run_dir / "matrix.csv").read_bytes() == (coordinator.run_dir / "matrix.csv").read_bytes()
    found, wanted = (
        json.loads((path / "results.json").read_bytes()) for path in (coordinator.run_dir, trainer.run_dir)
    )
    for result in (found, wanted):
        del result["parameters"]["trainable"]
    assert found == wanted


@pytest.mark.parametrize("name", ALL)
def test_every_method_ends_as_in_simulation(name, network, federate):
    rounds = 2 if name in ("FedLSCL", "FedAvg") else 1
    coordinator = network(METHODS[name](), rounds_per_task=rounds).fit()
    trainer = federate(METHODS[name](), rounds_per_task=rounds)
    same_run(coordinator, trainer)
    same_files(coordinator, trainer)
