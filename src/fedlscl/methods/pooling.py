"""The closed-form heads of a collaborator, from sums over all clients and tasks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlscl.analytic import MomentSums, discriminant_solution
from fedlscl.federated.client import Client
from fedlscl.federated.payload import Payload
from fedlscl.methods.controls import add_sums, moments_of_task
from fedlscl.nets.collaborator import HEADS


def sums_for(head: str, client: Client, or_zeros: bool = False) -> Payload:
    """What a client adds to the sums behind a head for its task; without samples nothing, or zeros."""
    sums = moments_of_task(client, HEADS[head])
    if or_zeros and not sums:
        num_classes, width = client.net.head.weight.shape
        sums = {"gram": torch.zeros(width + 1, width + 1), "products": torch.zeros(width + 1, num_classes)}
    return {f"{head}.{name}": value for name, value in sums.items()}


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
