"""Malformed uploads: are all rejected, and is the round's result that of a round without the sender?"""

import random
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch

import malformed
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.trainer import aggregate, train_server
from fedlscl.federated.validation import UploadValidator
from fedlscl.testing import Recorded, tensors
from robustness_sections.notes import Notes
from tiny_methods import METHODS

SENDING = ("FedAvg", "FedBE", "FedLSCL", "FedRidge", "FedWeIT", "LoRM", "PILoRA")
"""Methods with uploads of different kinds."""


class Moment(NamedTuple):
    """A federation just before a server step."""

    method: Method
    validator: dict[str, Any]
    uploads: list[Upload]
    progress: Progress


class Moments(Recorded):
    """Keeps the moments before all server steps."""

    def _server_step(self, uploads: list[Upload]) -> None:
        run, state = self.run, deepcopy(self.run.validator.state_dict())
        self.moments = [*getattr(self, "moments", []), Moment(deepcopy(run.method), state, uploads, run.progress)]
        super()._server_step(uploads)


def moments_of(name: str, clients: int) -> tuple[Moments, list[Moment]]:
    """Four rounds of a method on fake data."""
    data = SpatialTemporalDataModule(
        dataset="fake", fake_classes=4 * clients, num_clients=clients, num_tasks=2, private_classes=2, public_classes=2,
        train_per_class=8, test_per_class=4, image_size=16, batch_size=8,
    )  # fmt: skip
    method = METHODS[name]()
    run = Moments()
    run.fit(method, data)
    assert run.run.validator.rejected == []
    return run, run.moments


def uploads(notes: Notes, number: int = 100, clients: int = 4, seed: int = 42) -> dict[str, Any]:
    """By kind: how many were sent, how many refused, how often the answers equal those without the sender."""
    made, known = {name: moments_of(name, clients) for name in SENDING}, {}

    def send(kind: str) -> dict[str, int]:
        picker, counts = random.Random(f"{seed} {kind}"), {"sent": 0, "refused": 0, "equal": 0}
        while counts["sent"] < number:
            name, number_of = picker.choice(SENDING), picker.randrange(4)
            run, moments = made[name]
            moment = moments[number_of]
            bad = picker.choice(moment.uploads)
            if not bad.payload:
                continue
            honest = [upload for upload in moment.uploads if upload is not bad]
            counts["sent"] += 1
            place = name, number_of, bad.client
            if place not in known:
                known[place], _ = step(run, moment, honest, bad, [])
            answers, refused = step(run, moment, honest, bad, malformed.KINDS[kind](bad, picker))
            counts["refused"] += refused
            counts["equal"] += same(answers, known[place])
        return counts

    return {kind: notes.once(f"{clients} clients, {kind}", partial(send, kind)) for kind in malformed.KINDS}


def step(
    run: Moments, moment: Moment, honest: list[Upload], bad: Upload, arrived: list[Any]
) -> tuple[dict[str, Any], bool]:
    """What the server answers and keeps, and whether it refused the bad upload and no other."""
    method, validator = deepcopy(moment.method), deepcopy(run.run.validator)
    validator.method, validator.norms, validator.rejected = method, {}, []
    validator.load_state_dict(moment.validator)
    all_uploads = sorted(
        [*honest, *malformed.deliver(validator, bad, arrived, moment.progress)],
        key=lambda upload: bad.client if upload not in honest else upload.client,
    )
    admitted = validator.filter(all_uploads, moment.progress)
    is_refused = len(validator.rejected) == 1 and [u.client for u in admitted] == [u.client for u in honest]
    answers: dict[str, Payload] = {}
    if admitted:
        job = method, run.run.seed, admitted, moment.progress
        train_server(*job, lambda client, stage: run.run.engine.train(stage))
        answers = {str(client): answer for client, answer in aggregate(*job).items()}
    return {"answers": answers, "method": method.state_dict(), "norms": norms(validator)}, is_refused


def norms(validator: UploadValidator) -> dict[str, torch.Tensor]:
    """Norms that the validator remembers."""
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in validator.norms.items()}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal tensors at equal places, to the bit."""
    left, right = dict(tensors(found)), dict(tensors(wanted))
    return left.keys() == right.keys() and all(torch.equal(left[place], right[place]) for place in right)
