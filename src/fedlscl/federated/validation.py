"""The door: what the server checks of every upload before a method sees it.

Who sent it and when, how large it is, whether it is made as the method says (``Method.expects``), whether its numbers
are finite and of a size that others send. Whoever fails is left out of the round, with a reason, as if it had not come.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlscl.federated.method import Method, Progress, StreamShape
from fedlscl.federated.payload import Payload, Upload, one_line
from fedlscl.nets.net import Net

SAMPLES = "number of samples"
"""Stands among the names of tensors for what a client weighs."""
REMEMBERED = 25
"""Norms of each tensor that the median is of, beside those of the round (ours)."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """How large an upload may be (all of it ours)."""

    max_norm_ratio: float = 1000.0
    """How many times the median norm a tensor's may be, and the median number of samples a client's; 0 for any."""
    upload_gb: float = 1.0
    """Largest upload, in units of 2^30 bytes."""

    def __post_init__(self) -> None:
        """Refuse what would refuse everybody."""
        if not (self.max_norm_ratio == 0 or self.max_norm_ratio >= 1):
            raise ValueError(
                f"max_norm_ratio {self.max_norm_ratio} is below the median itself: choose 1 or more, or 0."
            )
        if not self.upload_gb > 0:
            raise ValueError(f"upload_gb {self.upload_gb} lets nothing in: choose more than 0.")

    @property
    def num_bytes(self) -> int:
        """Of the largest upload."""
        return int(self.upload_gb * 2**30)


class RejectedUpload(NamedTuple):
    """An upload that was not let in; its sender gets no answer in that round."""

    client: int
    task: int
    round: int
    reason: str


class UploadValidator:
    """Checks uploads against the method, the round, and each other.

    Args:
        method: says what an honest upload is made of.
        stream: clients are numbered below its number of clients, and class counts have its number of classes.
        limits: how large an upload may be.
    """

    def __init__(self, method: Method, stream: StreamShape, limits: UploadLimits | None = None) -> None:
        self.method, self.stream = method, stream
        self.limits = limits or UploadLimits()
        self.norms: dict[str, list[float]] = {}
        self.rejected: list[RejectedUpload] = []
        self._net: Net | None = None
        self._start: dict[str, float] = {}

    def filter(self, uploads: list[Upload], progress: Progress) -> list[Upload]:
        """The uploads that pass, in their order; the others are noted in ``rejected`` and logged."""
        counted = Counter(_number(upload.client) for upload in uploads)
        errors_found = [self._error(upload, progress, counted[_number(upload.client)]) for upload in uploads]
        norms = [
            {} if flaw else {SAMPLES: float(upload.num_samples), **norms_of(upload.payload)}
            for upload, flaw in zip(uploads, errors_found, strict=True)
        ]
        limits = self._largest(norms)
        admitted = []
        for upload, flaw, sizes in zip(uploads, errors_found, norms, strict=True):
            reason = flaw or too_large(sizes, limits)
            if reason:
                self.reject(_number(upload.client), progress, reason)
            else:
                admitted.append(upload)
                for name, size in sizes.items():
                    self.norms[name] = [*self.norms.get(name, ()), size][-REMEMBERED:]
        return admitted

    def reject(self, client: int, progress: Progress, reason: str) -> None:
        """Quarantine a client for the round; for a message that could not even be read, whoever received it calls."""
        refusal = RejectedUpload(client, progress.task, progress.round, reason)
        if refusal in self.rejected:
            return
        self.rejected.append(refusal)
        place = f"task {progress.task + 1}, round {progress.round + 1}"
        logger.warning(f"client {client} is left out of {place}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """Norms that were let in, and refusals so far."""
        return {
            "norms": {name: list(values) for name, values in self.norms.items()},
            "rejected": [refusal._asdict() for refusal in self.rejected],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.norms = {name: list(values) for name, values in state["norms"].items()}
        self.rejected = [RejectedUpload(**refusal) for refusal in state["rejected"]]

    def _error(self, upload: Upload, progress: Progress, times: int) -> str:
        """What is wrong with an upload by itself; nothing if nothing is."""
        try:
            return (
                sender_error(upload, progress, self.stream.num_clients, times)
                or counts_error(upload.class_counts, self.stream.num_classes)
                or tensors_error(upload.payload, self.limits.num_bytes)
                or self._spec_error(upload)
                or values_error(upload.payload)
                or self.method.check_upload(upload)
            )
        except Exception as error:  # Whatever an upload can make a check do, it must not end the others' round.
            return f"cannot be checked ({type(error).__name__}: {one_line(error)})"

    def _spec_error(self, upload: Upload) -> str:
        if self._net is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._net = self.method.build_net(0, self.stream)
        expected = self.method.upload_spec(upload, self._net)
        if expected is None:
            return ""
        known = {n: v for n, v in expected.items() if n not in self._start and v.device.type != "meta"}
        self._start |= norms_of(known)
        return spec_error(upload.payload, expected)

    def _largest(self, norms: list[dict[str, float]]) -> dict[str, float]:
        """The largest norm of each tensor: a multiple of the upper median of earlier norms and of this round's.

        What the method's net holds at its start has a vote, too: without it the first round of two clients could not be
        decided. As long as at least half of all votes are honest, a limit is no smaller than that multiple of the
        smallest honest norm; as long as more than half are, no larger than that of the largest. What most send as zeros
        has no limit.
        """
        limits = {}
        for name in {name: None for sizes in norms for name in sizes} if self.limits.max_norm_ratio else ():
            start = [self._start[name]] if self._start.get(name) else []
            known = sorted([*start, *self.norms.get(name, ()), *(sizes[name] for sizes in norms if name in sizes)])
            limits[name] = self.limits.max_norm_ratio * known[len(known) // 2] or float("inf")
        return limits


def sender_error(upload: Upload, progress: Progress, num_clients: int, times: int) -> str:
    """Whether the sender exists, has sent once, and means this round."""
    client, place = upload.client, (upload.task, upload.round)
    if type(client) is not int or not 0 <= client < num_clients:
        return f"sender {one_line(client)!r} is none of the {num_clients} clients"
    if times > 1:
        return f"it sent {times} uploads"
    if not all(type(number) is int for number in place) or place != progress.position:
        return f"it is for task {one_line(upload.task)}, round {one_line(upload.round)}, counted from 0"
    return ""


def counts_error(counts: Tensor, num_classes: int) -> str:
    """Whether class counts are whole numbers of samples, one for each class."""
    if type(counts) is not Tensor or counts.dtype != torch.int64 or counts.shape != (num_classes,):
        return f"its class counts are not {num_classes} whole numbers"
    if (counts < 0).any():
        return f"it has {int(counts.min())} samples of class {int(counts.argmin())}"
    if counts.double().sum() >= 2**53:
        return "it has more samples than can be counted"
    return ""


def tensors_error(payload: Payload, limit: int) -> str:
    """Whether a payload is plain tensors by name, of no more than so many bytes."""
    if type(payload) is not dict:
        return f"it is a {type(payload).__name__}, not tensors by name"
    for name, value in payload.items():
        is_plain = type(name) is str and type(value) is Tensor and value.layout is torch.strided
        if not is_plain or value.device.type != "cpu" or value.requires_grad or value.is_quantized:
            return f"{quoted(name)} is no plain tensor"
    size = sum(value.numel() * value.element_size() for value in payload.values())
    return f"it has {size} bytes, more than {limit}" if size > limit else ""


def spec_error(payload: Payload, expected: Payload) -> str:
    """Whether names, shapes and dtypes are the expected ones."""
    missing, unknown = expected.keys() - payload.keys(), payload.keys() - expected.keys()
    if missing:
        return f"{quoted(min(missing))} is missing"
    if unknown:
        return f"{quoted(min(unknown))} is not expected"
    for name, wanted in expected.items():
        value = payload[name]
        if value.shape != wanted.shape:
            return f"{quoted(name)} has shape {one_line(tuple(value.shape))}, not {tuple(wanted.shape)}"
        if value.dtype != wanted.dtype:
            return f"{quoted(name)} is {value.dtype}, not {wanted.dtype}"
    return ""


def values_error(payload: Payload) -> str:
    """Whether all numbers are finite."""
    return next((f"{quoted(name)} is not finite" for name, v in payload.items() if not v.isfinite().all()), "")


def norms_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Euclidean norm of each floating tensor."""
    norms = {}
    for name, value in tensors.items():
        if value.is_floating_point():
            # Scaled, since squares of finite numbers need not be finite.
            largest = float(value.detach().abs().max()) if value.numel() else 0.0
            norms[name] = largest * float((value.detach().double() / largest).norm()) if largest else 0.0
    return norms


def too_large(norms: dict[str, float], limits: dict[str, float]) -> str:
    """The first tensor whose norm is beyond its limit."""
    for name, size in norms.items():
        if size > limits.get(name, float("inf")):
            what = SAMPLES if name == SAMPLES else f"norm of {quoted(name)}"
            return (
                f"its {what} is {size:.3g}, beyond {limits[name]:.3g}: if that is right, raise trainer.max_norm_ratio"
            )
    return ""


def quoted(name: Any) -> str:
    """A name that somebody else chose, fit for a log."""
    return repr(one_line(name))


def _number(client: Any) -> int:
    return client if type(client) is int else -1
