"""Checks that every method must pass: ``check(lambda: MyMethod(...))``."""

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method, Progress
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.nets.vit import fingerprint

# Runs on tiny fake data that keep every message: what the contract looks at.


class Recorded(FederatedTrainer):
    """Two rounds per task on the CPU, with all messages kept."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"accelerator": "cpu", "rounds_per_task": 2, "quorum": 0} | options)
        self.uploads: list[Upload] = []
        self.answers: list[list[Payload]] = []

    def _server_step(self, uploads: list[Upload]) -> None:
        method = self.run.method
        aggregate = method.aggregate

        def recorded(uploads: list[Upload], progress: Progress) -> list[Payload]:
            self.answers.append(aggregate(uploads, progress))
            return self.answers[-1]

        self.uploads += uploads
        method.aggregate = recorded
        try:
            super()._server_step(uploads)
        finally:
            del method.aggregate

    @property
    def states(self) -> dict[str, Any]:
        """All that a checkpoint says of server and clients."""
        return {"method": self.run.method.state_dict(), "clients": [client.state_dict() for client in self.clients]}


class Stopped(Exception):
    """The run was stopped on purpose."""


class Stop(Callback):
    """Ends a run after its n-th checkpoint."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_checkpoint(self, run: RunState) -> None:
        """Count."""
        self.left -= 1
        if not self.left:
            raise Stopped


def fake_data(**options: Any) -> SpatialTemporalDataModule:
    """Two clients, two tasks of two classes, six classes in all, where ``options`` do not say otherwise."""
    common = dict(
        dataset="fake", fake_classes=6, num_clients=2, num_tasks=2, private_classes=2, public_classes=2,
        train_per_class=8, test_per_class=4, image_size=16, batch_size=8,
    )  # fmt: skip
    return SpatialTemporalDataModule(**common | options)


def learn(method: Method, **options: Any) -> Recorded:
    """A finished run on the fake data."""
    run = Recorded(**options)
    run.fit(method, fake_data())
    return run


# What every method promises, as checks that a method of one's own can be put to: ``check(lambda: MyMethod(...))``.


def check(make: Callable[[], Method]) -> None:
    """Run a method on tiny fake data and hold it to every promise.

    Args:
        make: builds the method; small nets and one epoch make it quick.

    Raises:
        AssertionError: naming the promise that is broken.
    """
    run = learn(make())
    for check_one in CHECKS:
        check_one(run, make)


def check_finite(run: Recorded, make: Callable[[], Method]) -> None:
    """Accuracies are shares; losses and states are finite."""
    for mask in ("task_il", "class_il"):
        values = run.matrix.of(mask)[:, [0, 1, 1], [0, 0, 1]]
        require(bool(((values >= 0) & (values <= 1)).all()), f"accuracies ({mask}) {values.tolist()} are no shares")
    for path, tensor in tensors(run.states):
        require(not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"state {path} is not finite")
    for entry in run.history:
        terms = torch.tensor(list(entry["terms"].values()))
        require(bool(terms.isfinite().all()), f"the objective of stage {entry['stage']!r} is not finite: {entry}")


def check_payloads(run: Recorded, make: Callable[[], Method]) -> None:
    """A message is a dict of names and detached, finite tensors on the CPU; every upload gets an answer."""
    require(all(len(answers) == 2 for answers in run.answers), "aggregate gives not one answer for each upload")
    for payload in [upload.payload for upload in run.uploads] + [answer for round_ in run.answers for answer in round_]:
        require(type(payload) is dict, f"a message is a {type(payload).__name__}, not a dict")
        for name, value in payload.items():
            plain = type(name) is str and type(value) is Tensor
            require(plain, f"message {name!r} holds {type(value).__name__}: send tensors by name")
            require(value.device.type == "cpu", f"message {name!r} is on {value.device}: use outgoing()")
            require(not value.requires_grad, f"message {name!r} carries a gradient: use outgoing()")
            require(not value.is_floating_point() or bool(value.isfinite().all()), f"message {name!r} is not finite")


def check_upload_spec(run: Recorded, make: Callable[[], Method]) -> None:
    """What ``expects`` says is what ``upload`` sends."""
    for client, task, round_, reason in run.run.rejected:
        require(False, f"the upload of client {client} in task {task}, round {round_} is rejected: {reason}")


def check_memory(run: Recorded, make: Callable[[], Method]) -> None:
    """What is sent is a copy of what the client owns."""
    owned = {tensor.untyped_storage().data_ptr() for _, tensor in tensors(run.states["clients"]) if tensor.numel()}
    for upload in run.uploads:
        for name, value in upload.payload.items():
            is_shared = value.numel() and value.untyped_storage().data_ptr() in owned
            require(not is_shared, f"upload {name!r} shares memory with its client: use outgoing()")


def check_foundation(run: Recorded, make: Callable[[], Method]) -> None:
    """The frozen ViT neither changes nor travels."""
    foundation = run.clients[0].net.foundation
    if foundation is None:
        return
    require(fingerprint(foundation.vit) == foundation.fingerprint, "the frozen ViT was changed")
    frozen = [value for value in foundation.vit.state_dict().values() if value.unique().numel() > 1]
    for upload in run.uploads:
        for name, value in upload.payload.items():
            is_frozen = any(value.shape == part.shape and torch.equal(value, part) for part in frozen)
            require(not is_frozen, f"upload {name!r} holds weights of the frozen ViT")


def check_determinism(run: Recorded, make: Callable[[], Method]) -> None:
    """The same seed gives the same bits, after a run of the same object on another seed and in other surroundings."""
    method = make()
    with torch.random.fork_rng():
        torch.manual_seed(123)
        FederatedTrainer(accelerator="cpu", rounds_per_task=1, max_tasks=1).fit(method, fake_data(), seed=7)
        second = learn(method)
    same(second, run, "a second run of the same object")
    for found, wanted in zip(second.uploads, run.uploads, strict=True):
        require(found.payload.keys() == wanted.payload.keys(), "a second run of the same object sends other names")
        for name, value in wanted.payload.items():
            require(torch.equal(found.payload[name], value), f"a second run of the same object sends another {name!r}")


def check_resume(run: Recorded, make: Callable[[], Method]) -> None:
    """A run that is stopped in the middle of its second task ends as if it had not been."""
    with tempfile.TemporaryDirectory() as folder:
        stopped = Recorded(callbacks=[Stop(after=3)])
        stopped.run_dir = Path(folder)
        try:
            stopped.fit(make(), fake_data())
        except Stopped:
            pass
        resumed = Recorded()
        resumed.fit(make(), fake_data(), checkpoint=Path(folder, "checkpoint.pt"))
    same(resumed, run, "a resumed run (does state_dict give all that the server keeps?)")


def check_offloading(run: Recorded, make: Callable[[], Method]) -> None:
    """Clients that are put into a file whenever it is not their turn learn the same bits."""
    waiting = learn(make(), clients_gb=0)
    for client in waiting.clients:
        require(client.offloaded_to is not None, f"client {client.id} does not wait in a file")
        is_empty = all(parameter.is_meta for parameter in client.net.parameters())
        require(is_empty, f"client {client.id} waits in a file and in memory")
    what = "a run whose clients wait in files (is something of a client kept outside of it?)"
    same(waiting, run, what)
    num_synced_rounds = [
        [client.state_dict()["num_synced_rounds"] for client in each.clients] for each in (waiting, run)
    ]
    require(num_synced_rounds[0] == num_synced_rounds[1], f"{what} differs in who was answered")
    require(torch.equal(waiting.traffic["up"], run.traffic["up"]), f"{what} differs in what is sent")


def accepts_few_samples(run: Recorded, make: Callable[[], Method]) -> None:
    """A client that has 0, 1 or 2 samples of a task learns with finite numbers, uploads, and is answered."""
    for dirichlet_alpha, per_class, classes, seed, expected in FEW:
        data = fake_data(
            protocol="global",
            private_classes=0,
            public_classes=classes,
            dirichlet_alpha=dirichlet_alpha,
            train_per_class=per_class,
        )
        uneven = Recorded(max_norm_ratio=1e9)
        uneven.fit(make(), data, seed=seed)
        samples = [[len(client.data.train_ids(task)) for task in range(2)] for client in uneven.clients]
        assert samples == expected
        check_finite(uneven, make)
        check_upload_spec(uneven, make)
        num_synced_rounds = [client.num_synced_rounds for client in uneven.clients]
        require(
            num_synced_rounds == [2, 2],
            f"clients with {samples} samples by task are answered {num_synced_rounds} times in the last",
        )


FEW = ((0.01, 8, 4, 47, [[0, 16], [16, 0]]), (5.0, 3, 2, 2, [[1, 2], [2, 1]]))
"""Concentration, train samples per class, classes, seed, and the samples that they give by client and task."""


def check_state(run: Recorded, make: Callable[[], Method]) -> None:
    """State is tensors, numbers and text, since a checkpoint unpickles nothing else, and comes back as it was."""
    buffer = io.BytesIO()
    torch.save(run.states, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = Recorded()
    other.setup(make(), fake_data(), seed=7)
    other.run.method.load_state_dict(state["method"])
    for client, values in zip(other.clients, state["clients"], strict=True):
        client.load_state_dict(values)
    same_tensors(other.states, run.states, "restored state")


CHECKS = (
    check_finite,
    check_payloads,
    check_upload_spec,
    check_memory,
    check_foundation,
    check_state,
    check_determinism,
    check_resume,
    check_offloading,
    accepts_few_samples,
)
"""Each takes a finished run and a function that builds the method anew."""


def require(holds: bool, broken: str) -> None:
    """Raise what is broken."""
    if not holds:
        raise AssertionError(broken)


def same(run: Recorded, expected: Recorded, what: str) -> None:
    """Demand equal states, accuracies and losses, to the bit."""
    same_tensors(run.states, expected.states, what)
    accuracies = [trainer.matrix.values.nan_to_num(-1) for trainer in (run, expected)]
    require(torch.equal(*accuracies), f"{what} differs in its accuracies")
    require(run.history == expected.history, f"{what} differs in its losses")


def same_tensors(state: Any, expected: Any, what: str) -> None:
    """Demand equal tensors at equal places, to the bit."""
    found, wanted = dict(tensors(state)), dict(tensors(expected))
    require(found.keys() == wanted.keys(), f"{what} has other parts: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for path, tensor in wanted.items():
        require(torch.equal(found[path], tensor), f"{what} differs in {path}")


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists, each with where it stands."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from tensors(part, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from tensors(part, f"{path}/{number}")
