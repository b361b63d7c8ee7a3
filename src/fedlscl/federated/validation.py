"""Server-side validation of client uploads, before the method sees them.

Checked are the sender and the round, the size, the form (``Method.upload_spec``), finite values, the method's own rules
(``Method.check_upload``) and norms relative to those of other uploads. A rejected upload counts as not received.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlscl.federated.method import Method, Progress, StreamShape
from fedlscl.federated.payload import Payload, Upload, one_line
from fedlscl.federated.readout import Readouts
from fedlscl.nets.net import Net

SAMPLES = "number of samples"
"""Key of a client's number of samples among the norms of its tensors."""
NUM_NORMS = 25
"""Earlier norms of each tensor that enter the median, besides those of the round (ours)."""
logger = logging.getLogger(__name__)


class RejectedUpload(NamedTuple):
    """An upload that failed validation; its sender gets no response in that round."""

    client: int
    task: int
    round: int
    reason: str


@dataclass(eq=False)
class UploadValidator:
    """Validates uploads against the method, the round, and each other."""

    method: Method
    """Defines well-formed uploads."""
    stream: StreamShape | None = None
    """Sizes of the data; may be set later, before the first upload."""
    max_norm_ratio: float = 1000.0
    """Largest ratio of a tensor's norm, and of the number of samples, to the running median; 0 for no limit (ours)."""
    max_bytes: int = 2**30
    """Largest size of an upload (ours)."""
    norms: dict[str, list[float]] = field(default_factory=dict, init=False)
    rejected: list[RejectedUpload] = field(default_factory=list, init=False)
    _net: Net | None = field(default=None, init=False)
    _initial_norms: dict[str, float] = field(default_factory=dict, init=False)

    def filter(self, uploads: list[Upload], progress: Progress, rules: Method | Readouts | None = None) -> list[Upload]:
        """The valid uploads, in the same order; the others are added to ``rejected`` and logged.

        Other rules than the method's decide alone: norms are not compared, nor kept for the method's uploads.
        """
        sent = Counter(_sender(upload) for upload in uploads)
        errors = [self._error(upload, progress, sent[_sender(upload)], rules or self.method) for upload in uploads]
        norms = [
            {} if error or rules else {SAMPLES: float(upload.num_samples), **_norms(upload.payload)}
            for upload, error in zip(uploads, errors, strict=True)
        ]
        limits = self._norm_limits(norms)
        accepted = []
        for upload, error, sizes in zip(uploads, errors, norms, strict=True):
            if reason := error or _norm_error(sizes, limits):
                self.reject(_sender(upload), progress, reason)
                continue
            accepted.append(upload)
            for name, size in sizes.items():
                self.norms[name] = [*self.norms.get(name, ()), size][-NUM_NORMS:]
        return accepted

    def reject(self, client: int, progress: Progress, reason: str) -> None:
        """Record and log that a client's upload is not used in this round; also called for unreadable messages."""
        rejected = RejectedUpload(client, progress.task, progress.round, reason)
        if rejected not in self.rejected:
            self.rejected.append(rejected)
            position = f"task {progress.task + 1}, round {progress.round + 1}"
            logger.warning(f"client {client} is left out of {position}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """Norms of accepted uploads, and rejected uploads."""
        return {"norms": dict(self.norms), "rejected": [rejected._asdict() for rejected in self.rejected]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        self.norms = dict(state["norms"])
        self.rejected = [RejectedUpload(**rejected) for rejected in state["rejected"]]

    def _error(self, upload: Upload, progress: Progress, times: int, rules: Method | Readouts) -> str:
        """The reason to reject an upload on its own, or an empty string."""
        try:
            return next(self._errors(upload, progress, times, rules), "") or rules.check_upload(upload)
        except Exception as error:  # No upload may end the round of the other clients.
            return f"cannot be checked ({type(error).__name__}: {one_line(error)})"

    def _errors(self, upload: Upload, progress: Progress, times: int, rules: Method | Readouts) -> Iterator[str]:
        """Errors of an upload; each check requires that those before it have passed."""
        stream, client, position = self.stream, upload.client, (upload.task, upload.round)
        assert stream is not None
        if type(client) is not int or not 0 <= client < stream.num_clients:
            yield f"sender must be a client from 0 to {stream.num_clients - 1}, got {one_line(client)!r}"
        if times > 1:
            yield f"it sent {times} uploads"
        if not all(type(number) is int for number in position) or position != progress.position:
            yield f"it is for task {one_line(upload.task)}, round {one_line(upload.round)}, counted from 0"
        counts, payload = upload.class_counts, upload.payload
        if type(counts) is not Tensor or counts.dtype != torch.int64 or counts.shape != (stream.num_classes,):
            yield f"its class counts must be {stream.num_classes} integers (int64)"
        if (counts < 0).any():
            yield f"its class counts must be >= 0, got {int(counts.min())} for class {int(counts.argmin())}"
        if counts.double().sum() >= 2**53:
            yield "its class counts must sum to less than 2^53"
        if type(payload) is not dict:
            yield f"its payload must be a dict of tensors, got {type(payload).__name__}"
        for name, value in payload.items():
            is_plain = type(name) is str and type(value) is Tensor and value.layout is torch.strided
            if not is_plain or value.device.type != "cpu" or value.requires_grad or value.is_quantized:
                yield f"{_quoted(name)} must be a plain tensor on the CPU"
        size = sum(value.numel() * value.element_size() for value in payload.values())
        if size > self.max_bytes:
            yield f"it has {size} bytes, more than {self.max_bytes}"
        expected = self._expected(upload, rules)
        if missing := expected.keys() - payload.keys():
            yield f"{_quoted(min(missing))} is missing"
        if unknown := payload.keys() - expected.keys():
            yield f"{_quoted(min(unknown))} is not expected"
        for name, value in payload.items():
            if value.shape != expected[name].shape:
                yield f"{_quoted(name)} has shape {one_line(tuple(value.shape))}, not {tuple(expected[name].shape)}"
            if value.dtype != expected[name].dtype:
                yield f"{_quoted(name)} is {value.dtype}, not {expected[name].dtype}"
            if not value.isfinite().all():
                yield f"{_quoted(name)} is not finite"

    def _expected(self, upload: Upload, rules: Method | Readouts) -> Payload:
        """The specification of an upload; without one, the upload itself."""
        if self._net is None:
            assert self.stream is not None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._net = self.method.build_net(0, self.stream)
        expected = rules.upload_spec(upload, self._net)
        if expected is None:
            return upload.payload
        new = {n: v for n, v in expected.items() if n not in self._initial_norms and v.device.type != "meta"}
        self._initial_norms |= _norms(new)
        return expected

    def _norm_limits(self, norms: list[dict[str, float]]) -> dict[str, float]:
        """Limit of each tensor's norm: a multiple of the upper median of earlier norms and of this round's.

        The norm in the newly built net is one of them: without it the first round of two clients could not be decided.
        If at least half of all norms are of valid uploads, a limit is at least the multiple of the smallest of these;
        if more than half are, at most that of the largest. Tensors that most clients send as zeros have no limit.
        """
        if not self.max_norm_ratio:
            return {}
        limits = {}
        for name in {name for sizes in norms for name in sizes}:
            initial = [self._initial_norms[name]] if self._initial_norms.get(name) else []
            known = sorted([*initial, *self.norms.get(name, ()), *(sizes[name] for sizes in norms if name in sizes)])
            limits[name] = self.max_norm_ratio * known[len(known) // 2] or float("inf")
        return limits


def _sender(upload: Upload) -> int:
    return upload.client if type(upload.client) is int else -1


def _norm_error(norms: dict[str, float], limits: dict[str, float]) -> str:
    for name, size in norms.items():
        if size > limits.get(name, float("inf")):
            what = SAMPLES if name == SAMPLES else f"norm of {_quoted(name)}"
            return f"its {what} is {size:.3g}, beyond {limits[name]:.3g}: if correct, raise trainer.max_norm_ratio"
    return ""


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    norms = {}
    for name, value in tensors.items():
        if value.is_floating_point():
            # Scaled, since squares of finite numbers need not be finite.
            largest = float(value.detach().abs().max()) if value.numel() else 0.0
            norms[name] = largest * float((value.detach().double() / largest).norm()) if largest else 0.0
    return norms


def _quoted(name: Any) -> str:
    return repr(one_line(name))
