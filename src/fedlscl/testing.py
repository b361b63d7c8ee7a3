"""``check_method`` runs a method on tiny fake data and checks what every method must satisfy."""

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.method import Method
from fedlscl.federated.payload import Payload, Upload
from fedlscl.federated.state import Callback, RunState
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.nets.vit import fingerprint


def check_method(make: Callable[[], Method]) -> None:
    """Run all checks of ``CHECKS`` on the method that ``make`` builds, with small nets and one epoch.

    Raises:
        AssertionError: naming the first violation.

    Example:
        >>> from fedlscl.methods import FedNCM
        >>> from fedlscl.nets.vit import FoundationConfig
        >>> check_method(lambda: FedNCM(foundation=FoundationConfig(name="test_vit", weights="random", image_size=32)))
    """
    run = learn(make())
    for check in CHECKS:
        check(run, make)


class Recorded(FederatedTrainer):
    """Two rounds per task on the CPU; keeps all messages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"accelerator": "cpu", "rounds_per_task": 2, "quorum": 0} | options)
        self.uploads: list[Upload] = []
        self.answers: list[list[Payload]] = []

    @override
    def _server_step(self, uploads: list[Upload]) -> None:
        self.uploads += uploads
        super()._server_step(uploads)

    @override
    def _aggregate(self, uploads: list[Upload]) -> dict[int, Payload]:
        answers = super()._aggregate(uploads)
        self.answers.append(list(answers.values()))
        return answers

    @property
    def states(self) -> dict[str, Any]:
        """State of the server and the clients, as in a checkpoint."""
        return {"method": self.run.method.state_dict(), "clients": [client.state_dict() for client in self.clients]}


class Stopped(Exception):
    """Raised by `Stop`."""


class Stop(Callback):
    """Ends a run with `Stopped` after its n-th checkpoint."""

    def __init__(self, after: int) -> None:
        self.left = after

    @override
    def on_checkpoint(self, run: RunState) -> None:
        self.left -= 1
        if not self.left:
            raise Stopped


def fake_data(**options: Any) -> SpatialTemporalDataModule:
    """Two clients, two tasks of two classes, six classes in all; ``options`` override that."""
    split = {"num_clients": 2, "num_tasks": 2, "private_classes": 2, "public_classes": 2}
    images = {"dataset": "fake", "fake_classes": 6, "train_per_class": 8, "test_per_class": 4, "image_size": 16}
    return SpatialTemporalDataModule(**{**split, **images, "batch_size": 8, **options})


def learn(method: Method, **options: Any) -> Recorded:
    """A finished run on the fake data."""
    run = Recorded(**options)
    run.fit(method, fake_data())
    return run


def require(condition: bool, violation: str) -> None:
    """Raise an AssertionError unless a condition holds."""
    if not condition:
        raise AssertionError(violation)


def check_finite(run: Recorded, make: Callable[[], Method]) -> None:
    """Accuracies are in [0, 1]; losses and states are finite."""
    for mask in ("task_il", "class_il"):
        values = run.matrix.of(mask)[:, [0, 1, 1], [0, 0, 1]]
        require(bool(((values >= 0) & (values <= 1)).all()), f"accuracies ({mask}) must be in [0, 1], got {values}")
    for path, tensor in tensors(run.states):
        require(not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"state {path} is not finite")
    for entry in run.run.history:
        terms = torch.tensor(list(entry["terms"].values()))
        require(bool(terms.isfinite().all()), f"the objective of stage {entry['stage']!r} is not finite: {entry}")


def check_payloads(run: Recorded, make: Callable[[], Method]) -> None:
    """Payloads are dicts of detached, finite CPU tensors by name; every upload gets a response."""
    require(all(len(answers) == 2 for answers in run.answers), "aggregate must return one response for each upload")
    for payload in [upload.payload for upload in run.uploads] + [answer for round_ in run.answers for answer in round_]:
        require(type(payload) is dict, f"a payload must be a dict, got {type(payload).__name__}")
        for name, value in payload.items():
            is_tensor = type(name) is str and type(value) is Tensor
            require(is_tensor, f"message {name!r} must be a tensor, got {type(value).__name__}")
            require(value.device.type == "cpu", f"message {name!r} is on {value.device}: use outgoing()")
            require(not value.requires_grad, f"message {name!r} carries a gradient: use outgoing()")
            require(not value.is_floating_point() or bool(value.isfinite().all()), f"message {name!r} is not finite")


def check_upload_spec(run: Recorded, make: Callable[[], Method]) -> None:
    """Uploads pass validation against ``upload_spec``."""
    for client, task, round_, reason in run.run.rejected:
        require(False, f"the upload of client {client} in task {task}, round {round_} is rejected: {reason}")


def check_memory(run: Recorded, make: Callable[[], Method]) -> None:
    """Uploads share no memory with the client."""
    owned = {tensor.untyped_storage().data_ptr() for _, tensor in tensors(run.states["clients"]) if tensor.numel()}
    for upload in run.uploads:
        for name, value in upload.payload.items():
            is_shared = value.numel() and value.untyped_storage().data_ptr() in owned
            require(not is_shared, f"upload {name!r} shares memory with its client: use outgoing()")


def check_foundation(run: Recorded, make: Callable[[], Method]) -> None:
    """The frozen ViT does not change and is not sent."""
    foundation = run.clients[0].net.foundation
    if foundation is None:
        return
    require(fingerprint(foundation.vit) == foundation.fingerprint, "the frozen ViT was changed")
    frozen = [value for value in foundation.vit.state_dict().values() if value.unique().numel() > 1]
    for upload in run.uploads:
        for name, value in upload.payload.items():
            is_frozen = any(value.shape == part.shape and torch.equal(value, part.cpu()) for part in frozen)
            require(not is_frozen, f"upload {name!r} contains weights of the frozen ViT")


def check_determinism(run: Recorded, make: Callable[[], Method]) -> None:
    """The same seed gives the same bits, also after a run of the same object with another seed."""
    method = make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        FederatedTrainer(accelerator="cpu", rounds_per_task=1, max_tasks=1).fit(method, fake_data(), seed=7)
        second = learn(method)
    same(second, run, "a second run of the same object")
    found, wanted = ([upload.payload for upload in each.uploads] for each in (second, run))
    same_tensors(found, wanted, "what a second run of the same object uploads")


def check_resume(run: Recorded, make: Callable[[], Method]) -> None:
    """A run that is stopped in its second task and resumed gives the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        stopped = Recorded(callbacks=[Stop(after=3)])
        stopped.run_dir = Path(folder)
        with suppress(Stopped):
            stopped.fit(make(), fake_data())
        resumed = Recorded()
        resumed.fit(make(), fake_data(), checkpoint=Path(folder, "checkpoint.pt"))
    same(resumed, run, "a resumed run (does state_dict have the whole state of the server?)")


def check_offloading(run: Recorded, make: Callable[[], Method]) -> None:
    """Clients that are offloaded after every turn give the same bits."""
    offloaded = learn(make(), clients_gb=0)
    for client in offloaded.clients:
        is_empty = all(parameter.is_meta for parameter in client.net.parameters())
        require(client.offloaded_to is not None and is_empty, f"client {client.id} is not offloaded completely")
    what = "a run with offloaded clients (is some state of a client stored outside of it?)"
    same(offloaded, run, what)
    synced = [[client.state_dict()["num_synced_rounds"] for client in each.clients] for each in (offloaded, run)]
    require(synced[0] == synced[1], f"{what} differs in its numbers of synced rounds")


def check_few_samples(run: Recorded, make: Callable[[], Method]) -> None:
    """A client with 0, 1 or 2 samples of a task trains with finite numbers, uploads, and gets responses."""
    # Dirichlet alpha, train samples per class, classes, seed, and the resulting samples by client and task.
    few, fewer = (0.01, 8, 4, 47, [[0, 16], [16, 0]]), (5.0, 3, 2, 2, [[1, 2], [2, 1]])
    for alpha, per_class, classes, seed, expected in (few, fewer):
        options = dict(protocol="global", private_classes=0, public_classes=classes, train_per_class=per_class)
        uneven = Recorded(max_norm_ratio=1e9)
        uneven.fit(make(), fake_data(dirichlet_alpha=alpha, **options), seed=seed)
        samples = [[len(client.data.train_ids(task)) for task in range(2)] for client in uneven.clients]
        assert samples == expected
        check_finite(uneven, make)
        check_upload_spec(uneven, make)
        synced = [client.num_synced_rounds for client in uneven.clients]
        require(synced == [2, 2], f"clients with {samples} samples by task got {synced} responses in the last task")


def check_state(run: Recorded, make: Callable[[], Method]) -> None:
    """States are tensors, numbers and text, and are restored exactly."""
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
    check_finite, check_payloads, check_upload_spec, check_memory, check_foundation, check_state, check_determinism,
    check_resume, check_offloading, check_few_samples,
)  # fmt: skip
"""Functions of a finished run and of a function that builds the method."""


def same(run: Recorded, expected: Recorded, what: str) -> None:
    """Require equal states, accuracies, traffic and losses, bit for bit."""
    found, wanted = (
        {"states": each.states, "accuracies": each.matrix.values.nan_to_num(-1), "traffic": each.run.traffic}
        for each in (run, expected)
    )
    same_tensors(found, wanted, what)
    require(run.run.history == expected.run.history, f"{what} differs in its losses")


def same_tensors(state: Any, expected: Any, what: str) -> None:
    """Require equal tensors under equal paths, bit for bit."""
    found, wanted = dict(tensors(state)), dict(tensors(expected))
    require(found.keys() == wanted.keys(), f"{what} has other parts: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for path, tensor in wanted.items():
        require(torch.equal(found[path], tensor), f"{what} differs in {path}")


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{path}/{name}")
