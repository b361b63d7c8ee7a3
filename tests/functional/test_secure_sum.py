import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlscl.functional.privacy import decode, encode, masked, new_private_key, pair_mask, public_key, unmasked_sum

PRIVATE = {member: torch.full((32,), 7 * member + 1, dtype=torch.uint8) for member in (0, 2, 3, 7)}
KEYS = {member: public_key(private) for member, private in PRIVATE.items()}


def mask_all(terms, context="0/1"):
    keys = {member: KEYS[member] for member in terms}
    return {member: masked(terms[member], member, PRIVATE[member], keys, context) for member in terms}


@st.composite
def federations(draw):
    """Terms of two to four members: a matrix and a vector each, of any scale."""
    members = draw(st.lists(st.sampled_from(sorted(PRIVATE)), min_size=2, max_size=4, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns, length = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 5))
    scale = draw(st.sampled_from([1e-9, 1.0, 1e6]))
    return {
        member: {
            "gram": scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64),
            "b": scale * torch.randn(length, generator=generator),
        }
        for member in members
    }


@settings(max_examples=25)
@given(federations(), st.randoms())
def test_masks_cancel_exactly_in_any_order(terms, random):
    uploads = list(mask_all(terms).items())
    random.shuffle(uploads)
    total = unmasked_sum(dict(uploads), sorted(terms))
    for name in ("gram", "b"):
        assert torch.equal(total[name], decode(sum(encode(part[name], len(terms)) for part in terms.values())))
        exact = sum(part[name].double() for part in terms.values())
        size = sum(part[name].double().abs() for part in terms.values())
        assert (total[name] - exact).abs().le(len(terms) * 2.0**-37 + 1e-15 * size).all()


@given(st.lists(st.floats(-4e7, 4e7), max_size=6))
def test_fixed_point_rounds_to_half_a_step(values):
    values = torch.tensor(values, dtype=torch.float64)
    assert (decode(encode(values, 3)) - values).abs().le(2.0**-37 + 2.0**-52 * values.abs()).all()


def chi_square(words):
    """Of the bytes against the uniform distribution; 255 degrees of freedom."""
    counts = np.bincount(np.frombuffer(words.numpy().tobytes(), np.uint8), minlength=256)
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_whatever_lacks_a_member_looks_uniform():
    """Every sum over a proper subset of the uploads; the keys are fixed, and so is the outcome."""
    terms = {member: {"x": torch.linspace(-1, 1, 8192) * member} for member in PRIVATE}
    uploads = mask_all(terms)
    bound = 255 + 4 * (2 * 255) ** 0.5
    for size in range(1, len(uploads)):
        for subset in itertools.combinations(uploads, size):
            partial = sum(uploads[member]["x"] for member in subset)
            assert chi_square(partial) < bound, subset
    assert chi_square(encode(terms[3]["x"], 4)) > 100 * bound
    assert chi_square(sum(upload["x"] for upload in uploads.values())) > 100 * bound


def test_a_pair_agrees_on_a_mask_that_nobody_else_and_no_other_sum_has():
    mask = pair_mask(PRIVATE[0], KEYS[2], "1/0/0/2", 8)
    assert (mask == pair_mask(PRIVATE[2], KEYS[0], "1/0/0/2", 8)).all()
    for other in (pair_mask(PRIVATE[0], KEYS[2], "1/1/0/2", 8), pair_mask(PRIVATE[3], KEYS[2], "1/0/0/2", 8)):
        assert (mask != other).all()
    assert (mask == pair_mask(PRIVATE[0], KEYS[2], "1/0/0/2", 20)[:8]).all()


def test_keys_are_x25519():
    """RFC 7748, section 6.1."""
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    public = public_key(torch.frombuffer(bytearray(private), dtype=torch.uint8))
    assert public.numpy().tobytes().hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"


def test_new_keys_do_not_follow_from_the_seed():
    keys = []
    for _ in range(2):
        torch.manual_seed(0)
        keys.append(new_private_key())
    assert not torch.equal(*keys) and all(key.dtype == torch.uint8 and key.shape == (32,) for key in keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda uploads: uploads.pop(2), r"lacks clients \[2\]"),
        (lambda uploads: (uploads.pop(0), uploads.pop(3)), r"lacks clients \[0, 3\]"),
        (lambda uploads: uploads.update({7: uploads[2]}), r"clients \[7\] have no keys in common"),
        (lambda uploads: uploads.update({2: {"y": uploads[2]["x"]}}), "client 2 sends other names"),
        (lambda uploads: uploads.update({3: {"x": uploads[3]["x"][:1]}}), "client 3 sends other names"),
    ],
)
def test_sums_that_cannot_be_unmasked_are_refused(change, message):
    uploads = mask_all({member: {"x": torch.ones(3)} for member in (0, 2, 3)})
    change(uploads)
    with pytest.raises(ValueError, match=message):
        unmasked_sum(uploads, [0, 2, 3])


@pytest.mark.parametrize("value", [2.0**27 / 3, -1e12, float("nan"), float("inf")])
def test_values_that_could_overflow_are_refused(value):
    with pytest.raises(ValueError, match="values in a secure sum of 3 members must be <"):
        encode(torch.tensor([0.0, value]), 3)
    assert encode(torch.tensor([0.99 * 2.0**27 / 3]), 3) > 0


def test_terms_are_left_alone():
    terms = {member: {"x": torch.ones(3)} for member in (0, 2)}
    mask_all(terms)
    assert all(torch.equal(part["x"], torch.ones(3)) for part in terms.values())
    assert masked({}, 0, PRIVATE[0], KEYS, "") == {}
