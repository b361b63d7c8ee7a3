"""The closed-form heads of a collaborator, from sums over all clients and tasks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlscl.analytic import MomentSums, discriminant_solution
from fedlscl.federated.payload import Payload
from fedlscl.federated.statistics import sums_flaw
from fedlscl.methods.controls import add_sums, empty_sums
from fedlscl.nets.collaborator import HEADS
from fedlscl.nets.net import Net


def sums_of(found: Mapping[str, MomentSums], heads: Sequence[str], net: Net, or_zeros: bool = False) -> Payload:
    """What a client adds to the sums behind its heads for its task; without samples nothing, or zeros."""
    payload: Payload = {}
    for head in heads:
        sums = found.get(head)
        if sums is None and or_zeros:
            sums = MomentSums(*(torch.zeros(part.shape) for part in empty_sums(net)))
        if sums is not None:
            payload |= {f"{head}.{name}": value for name, value in sums._asdict().items()}
    return payload


def heads_flaw(payload: Payload, counts: Tensor) -> str:
    """What shows that the sums behind a head are not of as many samples of each class as counted, (num_classes,)."""
    for head in HEADS:
        if f"{head}.gram" in payload:
            flaw = sums_flaw(MomentSums(*(payload[name] for name in _names(head))), counts)
            if flaw:
                return f"{head}.{flaw}"
    return ""


def with_sums(sums: Mapping[str, Tensor], head: str, payloads: Sequence[Payload]) -> dict[str, Tensor]:
    """The sums with what came for a head added."""
    added = dict(sums)
    add_sums(added, payloads, _names(head))
    return added


def solved_heads(sums: Mapping[str, Tensor], shrinkage: float) -> Payload:
    """Linear discriminants of all heads that there are sums for."""
    answer: Payload = {}
    for head in HEADS:
        if f"{head}.gram" in sums:
            moments = MomentSums(*(sums[name] for name in _names(head)))
            answer[f"{head}.weight"], answer[f"{head}.bias"] = discriminant_solution(moments, shrinkage)
    return answer


def _names(head: str) -> list[str]:
    return [f"{head}.{name}" for name in MomentSums._fields]
