"""Statistics of the right form and of a usual size that cannot be what they claim to be, and those that can."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.validation import UploadValidator
from fedlscl.functional.analytic import is_semidefinite, pack_symmetric, unpack_symmetric
from fedlscl.functional.distillation import Sums, solve
from fedlscl.testing import learn
from tiny_methods import METHODS

FIRST = Progress(0, 0)


@given(st.integers(1, 12), st.integers(1, 30), st.sampled_from([1e-6, 1.0, 1e6]), st.integers(0, 2**31))
def test_sums_of_outer_products_are_however_they_are_rounded(rows, size, scale, seed):
    x = scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    assert is_semidefinite(x.mT @ x)
    assert is_semidefinite((x.double().mT @ x.double()).float())


@given(st.integers(2, 30), st.integers(0, 2**31))
def test_what_takes_a_thousandth_of_the_trace_from_a_direction_without_inputs_is_not(size, seed):
    x = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    x[:, 0] = 0
    gram = x.mT @ x
    gram[0, 0] -= 1e-3 * gram.trace()
    assert not is_semidefinite(gram)


def test_corner_cases():
    assert is_semidefinite(torch.zeros(3, 3))
    assert not is_semidefinite(-torch.eye(3))
    assert not is_semidefinite(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    assert not is_semidefinite(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


@functools.cache
def run_of(method):
    """A finished run of two clients."""
    made = METHODS[method]()
    return learn(replace(made, upload_rank="exact") if method == "FedLSCL" else made)


def moments_with_a_negative_eigenvalue(payload):
    moment = unpack_symmetric(payload["moments"].clone(), len(payload["generator"]))
    moment[0, 0] -= 0.01
    return {"moments": pack_symmetric(moment)}


def less_on_the_diagonal(share):
    """Takes a share of the trace from one direction of the packed Gram matrix."""

    def spoil(payload):
        gram = unpack_symmetric(payload["gram"].clone(), len(payload["products"]))
        gram[0, 0] -= share * payload["products"][-1].sum()
        return {"gram": pack_symmetric(gram)}

    return spoil


def times(name, factor):
    return lambda payload: {name: factor * payload[name]}


def another_class(name):
    return lambda payload: {name: payload[name].roll(1, dims=1)}


SPOILT = [
    ("FedLSCL", moments_with_a_negative_eigenvalue, "moments are not positive semidefinite"),
    ("FedLSCL", times("moments", 50), "moments are larger than those of unit features"),
    ("FedRidge", less_on_the_diagonal(1.0), "gram is"),
    ("FedRidge", less_on_the_diagonal(0.001), "gram is"),
    ("FedRidge", times("gram", 1.1), "gram is larger than that of unit features"),
    ("FedRidge", another_class("products"), "products count other samples"),
    ("FedRidge", times("gram", -1), "gram is"),
    ("FedRidge", times("products", 2), "products count other samples"),
    ("FedNCM", times("means", 1.5), "means are larger than those of unit features"),
    ("LoRM", times("gram.head", -1), "gram.head must be positive semidefinite"),
    ("LoRM", times("gram.0", -1), "gram.0 must be positive semidefinite"),
]


@pytest.mark.parametrize(("method", "spoil", "reason"), SPOILT)
def test_they_are_refused_of_two_clients_too(method, spoil, reason):
    """Where norms cannot decide who is right."""
    run = run_of(method)
    honest, other = run.uploads[:2]
    bad = replace(other, payload={**other.payload, **spoil(other.payload)})
    validator = UploadValidator(run.method, StreamShape(6, 2, 2))
    assert validator.filter([honest, bad], FIRST) == [honest]
    (refusal,) = validator.rejected
    assert reason in refusal.reason and refusal.client == bad.client


def test_eq5_without_a_minimum_leaves_the_generator_as_it_is():
    """Of masked sums nobody can see what is in them."""
    generator = torch.randn(3, 4)
    others = Sums(torch.diag(torch.tensor([5.0, -4.0, 1.0])).double(), torch.zeros(3, 4).double())
    assert solve(generator, others, 1.0).equal(generator)
