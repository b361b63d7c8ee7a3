"""Secure sums within a method's hooks: keys in the run's first exchange, masked sums in all later ones.

In the first exchange a client sends a fresh public key and nothing else, and the server hands everybody's around; it
sums nothing. Private keys stay in the client's memory, hence in its checkpoint.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlscl.distillation import Sums, client_terms, solve, subtract_terms, symmetric, upper_triangle
from fedlscl.federated.client import Client
from fedlscl.federated.method import Progress
from fedlscl.federated.payload import Payload, Upload, outgoing
from fedlscl.noise import Secrets
from fedlscl.secure_sum import KEY_BYTES, masked, new_private_key, public_key, unmasked_sum

MEMBERS, KEYS = "members", "public_keys"
"""Names in the answer to the first exchange."""
MOMENTS, PRODUCTS = "moments", "products"
"""Names under which the two sums of Eq. 5 travel."""
PRIVATE, OWN, SUMMED = "secure.private_key", "secure.own.", "secure.task"
"""In a client's memory: its key; its share of the sums under way; the last task of which a sum came back."""


def announcement(client: Client, secrets: Secrets) -> Payload:
    """Draw a key pair, whose public half is all that leaves."""
    seeded = secrets == "seed"
    client.memory[PRIVATE] = torch.randint(256, (KEY_BYTES,), dtype=torch.uint8) if seeded else new_private_key()
    return {KEYS: public_key(client.memory[PRIVATE])}


def announced_form() -> Payload:
    """Names, shapes and dtypes of an announcement."""
    return {KEYS: torch.empty(KEY_BYTES, dtype=torch.uint8, device="meta")}


def introduction(uploads: list[Upload], progress: Progress) -> Payload:
    """Everybody's public key, for everybody.

    Raises:
        ValueError: if there is nobody to hide behind, or the task has no later round to sum anything in.
    """
    if len(uploads) < 2:
        raise ValueError("secure_sum of one client would be what it sent: have two clients or more.")
    if progress.last:
        raise ValueError(
            "secure_sum agrees on keys in the run's first exchange and sums nothing in it, so that its task needs "
            "another one: set rounds_per_task to 2 or more and server_every to round."
        )
    return {
        MEMBERS: torch.tensor([upload.client for upload in uploads]),
        KEYS: torch.stack([upload.payload[KEYS] for upload in uploads]),
    }


def knows_members(client: Client) -> bool:
    """Whether the client has everybody's key."""
    return MEMBERS in client.memory


def first_sum_of_task(client: Client) -> bool:
    """Whether no sum of the current task has come back to the client yet."""
    return SUMMED not in client.memory or int(client.memory[SUMMED]) != client.task


def masked_upload(client: Client, payload: Payload) -> Payload:
    """What the client adds to this round's sums, unreadable: C Phi in place of Phi, all else as it is."""
    terms = dict(payload)
    if "generator" in terms:
        generator = terms.pop("generator")
        own = client_terms(generator, symmetric(terms[MOMENTS], len(generator)))
        terms |= {MOMENTS: upper_triangle(own.moments), PRODUCTS: own.products}
        client.memory |= {OWN + name: terms[name] for name in (MOMENTS, PRODUCTS)}
    keys = dict(zip(client.memory[MEMBERS].tolist(), client.memory[KEYS], strict=True))
    return masked(terms, client.id, client.memory[PRIVATE], keys, f"{client.task}/{client.round}")


def masked_form(expected: Payload) -> Payload:
    """Names, shapes and dtypes of a masked upload, given those of the plain one."""
    named = {PRODUCTS if name == "generator" else name: value for name, value in expected.items()}
    return {name: value.to(torch.int64) for name, value in named.items()}


def sums_of_all(uploads: list[Upload], members: Tensor) -> dict[str, Tensor]:
    """What the masked terms of all members add up to."""
    return unmasked_sum({upload.client: upload.payload for upload in uploads}, members.tolist())


def take_over(client: Client, payload: Payload, lambda_proximal: float, data_anchor: float) -> None:
    """Remember everybody's key, or solve Eq. 5 with the sums of all less one's own."""
    if KEYS in payload:
        client.memory |= outgoing({name: payload[name] for name in (MEMBERS, KEYS)})
        return
    client.memory[SUMMED] = torch.tensor(client.task)
    if PRODUCTS in payload:
        own = _matrices({name: client.memory.pop(OWN + name) for name in (MOMENTS, PRODUCTS)})
        others = subtract_terms(_matrices(payload), own)
        generator = client.net.generator
        fused = solve(generator.matrix.cpu(), others, lambda_proximal, data_anchor, own.moments)
        generator.load_matrix(fused.to(generator.weight.device))


def _matrices(terms: Mapping[str, Tensor]) -> Sums:
    return Sums(symmetric(terms[MOMENTS], len(terms[PRODUCTS])), terms[PRODUCTS])
