import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.method import federated_average
from fedlscl.federated.payload import Upload
from fedlscl.functional.aggregation import (
    classwise_average,
    norm_clipped,
    robust_average,
    robust_rows,
    trimmed_mean,
    weighted_average,
)
from reference import aggregation as reference

EPS = torch.finfo(torch.float32).eps


@st.composite
def uploads(draw, clients=(1, 5)):
    """States of one shape with a floating tensor, a scalar and a counter each, and weights."""
    k = draw(st.integers(*clients))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    states = [
        {
            "w": torch.randn(3, 4, generator=random),
            "scale": torch.randn((), generator=random),
            "counter": torch.randint(100, (), generator=random),
        }
        for _ in range(k)
    ]
    return states, draw(st.lists(st.integers(1, 500), min_size=k, max_size=k))


@given(uploads())
def test_average_is_the_weighted_mean(case):
    states, weights = case
    average = weighted_average(states, weights)
    for name in ("w", "scale"):
        exact = sum(w * state[name].double() for state, w in zip(states, weights, strict=True)) / sum(weights)
        assert average[name].dtype == torch.float32
        torch.testing.assert_close(average[name].double(), exact, rtol=EPS, atol=EPS)


@given(uploads(clients=(1, 1)))
def test_one_client_gets_its_own_state_bit_for_bit(case):
    (state,), weights = case
    average = weighted_average([state], weights)
    assert all(torch.equal(average[name], state[name]) for name in state)
    assert all(average[name].data_ptr() != state[name].data_ptr() for name in ("w", "scale"))


@given(uploads(), st.sampled_from([-2.0, 0.5, 4.0]))
def test_average_is_linear(case, factor):
    """Powers of two are exact, so equality is."""
    states, weights = case
    average = weighted_average(states, weights)
    scaled = weighted_average([{name: factor * value for name, value in s.items()} for s in states], weights)
    assert torch.equal(scaled["w"], factor * average["w"])


@given(uploads(), st.integers(2, 9))
def test_only_proportions_of_weights_count(case, factor):
    states, weights = case
    plain, scaled = weighted_average(states, weights), weighted_average(states, [factor * w for w in weights])
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


@given(uploads(clients=(2, 5)), st.data())
def test_order_of_clients_changes_nothing_beyond_float64_rounding(case, data):
    """Sums run in float64: in float32 at most the last bit can differ, where the exact value is a near tie."""
    states, weights = case
    order = data.draw(st.permutations(range(len(states))))
    permuted = weighted_average([states[i] for i in order], [weights[i] for i in order])
    plain = weighted_average(states, weights)
    double = [{"w": state["w"].double()} for state in states]
    left = weighted_average(double, weights)["w"]
    right = weighted_average([double[i] for i in order], [weights[i] for i in order])["w"]
    torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(permuted["w"], plain["w"], rtol=EPS, atol=0)
    assert torch.equal(permuted["counter"], plain["counter"])


def test_sums_are_in_double_precision():
    """In float32 a small update would vanish beside 2^24."""
    states = [{"w": torch.tensor([value])} for value in (2.0**24, 1.0, -(2.0**24))]
    assert weighted_average(states, [1] * 3)["w"].item() == pytest.approx(1 / 3)


@given(uploads())
def test_integer_tensors_stay_integers_and_take_the_largest(case):
    states, weights = case
    counter = weighted_average(states, weights)["counter"]
    assert counter.dtype == torch.int64
    assert counter.item() == max(state["counter"].item() for state in states)


@given(uploads(clients=(2, 5)))
def test_where_one_client_moved_the_average_moves_by_its_share(case):
    """V_s + a_i (V_i - V_s): why a plain average dilutes the rows of private classes."""
    states, weights = case
    server, moved = states[0]["w"], states[1]["w"]
    rows = [{"w": moved if i == 1 else server} for i in range(len(states))]
    share = weights[1] / sum(weights)
    expected = server.double() + share * (moved.double() - server.double())
    torch.testing.assert_close(weighted_average(rows, weights)["w"].double(), expected, rtol=EPS, atol=EPS)


@pytest.mark.parametrize("weights", [[0, 0], [float("nan"), 1]])
def test_weights_that_count_nobody_are_refused(weights):
    with pytest.raises(ValueError, match="weights must have a positive sum"):
        weighted_average([{"w": torch.zeros(1)}] * 2, weights)


@st.composite
def heads(draw):
    """Head rows (C, 3), a bias (C,) and sample counts (C,) of each client."""
    k, num_classes = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    counts = torch.randint(0, 3, (k, num_classes), generator=random) * torch.randint(
        1, 90, (k, num_classes), generator=random
    )
    rows, bias = torch.randn(k, num_classes, 3, generator=random), torch.randn(k, num_classes, generator=random)
    return list(rows), list(bias), list(counts)


@given(heads())
def test_each_row_is_averaged_by_the_samples_of_its_class(case):
    rows, bias, counts = case
    average, offsets = classwise_average(rows, counts), classwise_average(bias, counts)
    assert average.dtype == rows[0].dtype and average.shape == rows[0].shape and offsets.shape == bias[0].shape
    for label in range(len(average)):
        share = [int(count[label]) for count in counts]
        share = share if sum(share) else [1] * len(share)
        for values, result in ((rows, average), (bias, offsets)):
            exact = sum(s * v[label].double() for s, v in zip(share, values, strict=True)) / sum(share)
            torch.testing.assert_close(result[label].double(), exact, rtol=EPS, atol=EPS)


@given(heads())
def test_rows_of_a_private_class_are_the_owners_bit_for_bit(case):
    rows, bias, counts = case
    average, offsets = classwise_average(rows, counts), classwise_average(bias, counts)
    for label in range(len(average)):
        owners = [i for i, count in enumerate(counts) if count[label]]
        if len(owners) == 1:
            assert torch.equal(average[label], rows[owners[0]][label])
            assert torch.equal(offsets[label], bias[owners[0]][label])


def test_counts_are_left_alone():
    """Rows that nobody has are averaged uniformly, but nobody is made an owner."""
    counts = [torch.tensor([0, 2]), torch.tensor([0, 1])]
    average = classwise_average([torch.zeros(2, 1), torch.ones(2, 1)], counts)
    assert average.flatten().tolist() == [0.5, pytest.approx(1 / 3)]
    assert counts[0].tolist() == [0, 2] and counts[1].tolist() == [0, 1]


RULES = {
    "median": (lambda values: trimmed_mean(values, 0.5), reference.median),
    "trimmed_mean": (lambda values: trimmed_mean(values, 0.2), lambda values: reference.trimmed_mean(values, 0.2)),
}
robust = pytest.mark.parametrize("rule", RULES)


@st.composite
def stacks(draw, clients=(1, 8)):
    """Values of some clients, (k, 3, 2), some of them equal."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(draw(st.integers(*clients)), 3, 2, generator=random)
    return values.round() if draw(st.booleans()) else values


@robust
@given(values=stacks())
def test_robust_rules_do_what_they_say(rule, values):
    fast, slow = RULES[rule]
    torch.testing.assert_close(fast(values), slow(values), rtol=1e-12, atol=1e-12)


@robust
@given(values=stacks(), data=st.data())
def test_robust_rules_know_no_order_of_clients(rule, values, data):
    order = data.draw(st.permutations(range(len(values))))
    assert torch.equal(RULES[rule][0](values[order]), RULES[rule][0](values))


@robust
@given(values=stacks(clients=(5, 5)), bad=st.sampled_from([1e30, -1e30, 0.0, 3e38, 7.0]), place=st.integers(0, 4))
def test_one_of_five_cannot_move_a_robust_rule_beyond_the_others(rule, values, bad, place):
    others = torch.cat([values[:place], values[place + 1 :]]).double()
    values[place] = bad
    moved = RULES[rule][0](values)
    assert (moved >= others.amin(0)).all() and (moved <= others.amax(0)).all()


@given(values=stacks())
def test_without_trimming_it_is_the_mean(values):
    (mean,) = (weighted_average([{"w": value} for value in values], [1] * len(values)),)
    torch.testing.assert_close(trimmed_mean(values, 0.0).float(), mean["w"], rtol=EPS, atol=EPS)


@given(st.integers(1, 50), st.floats(0, 0.499))
def test_trimming_leaves_somebody_and_cuts_the_share_at_least_where_it_can(k, trim):
    """Up to ``cut`` ones among zeros leave no trace."""
    cut = sum(not trimmed_mean((torch.arange(k) < ones).float(), trim) for ones in range(1, k))
    assert 2 * cut < k and (cut >= trim * k or 2 * (cut + 1) >= k) and (cut > 0) == (trim > 0 and k > 2)


@given(values=stacks(clients=(3, 8)), bad=st.sampled_from([1e20, -1e20, 3.0, 0.0]), data=st.data())
def test_a_clipped_client_moves_the_mean_by_no_more_than_its_share_of_the_radius(values, bad, data):
    """One of three or more: the median lies among the others, and so does the median distance from it."""
    states = [{"a": value[:2], "b": value[2]} for value in values]
    place = data.draw(st.integers(0, len(values) - 1))
    states[place] = {"a": torch.full((2, 2), bad), "b": torch.zeros(2)}
    assert_close = torch.testing.assert_close
    for name in ("a", "b"):
        found = robust_average(norm_clipped(states), 0.0)[name]
        assert_close(found, reference.norm_clipped_mean(states)[name], rtol=1e-9, atol=1e-9)
    clipped = norm_clipped(states)
    centre = {name: trimmed_mean(torch.stack([state[name] for state in states]), 0.5) for name in ("a", "b")}
    distance = [sum(float((s[name] - centre[name]).square().sum()) for name in centre) ** 0.5 for s in clipped]
    others = [sum(float((s[n] - centre[n]).square().sum()) for n in centre) ** 0.5 for s in states]
    assert distance[place] <= max([*others[:place], *others[place + 1 :]]) * (1 + 1e-9)


def test_counters_take_the_middle_one():
    counters = [{"n": torch.tensor(value)} for value in (4, 2**60, 5)]
    assert robust_average(counters, 0.5)["n"] == 5


def test_rows_of_a_class_are_combined_among_those_who_have_it():
    rows = [
        torch.tensor([[1.0], [10.0], [5.0]]),
        torch.tensor([[2.0], [99.0], [6.0]]),
        torch.tensor([[9.0], [8.0], [7.0]]),
    ]
    counts = [torch.tensor([3, 1, 0]), torch.tensor([1, 0, 0]), torch.tensor([7, 0, 0])]
    # Class 0: the middle of all; class 1: its only holder; class 2: nobody has it, the middle of all.
    assert robust_rows(rows, counts, 0.5).flatten().tolist() == [2.0, 10.0, 6.0]


@pytest.mark.parametrize("aggregation", ["mean", "median", "trimmed_mean", "norm_clipped_mean"])
@pytest.mark.parametrize("head", ["classwise", "average"])
def test_one_upload_is_its_own_average(aggregation, head):
    payload = {"w": torch.randn(3, 2), "n": torch.tensor(3), "head.weight": torch.randn(4, 2)}
    upload = Upload(client=0, task=0, round=0, payload=payload, class_counts=torch.tensor([1, 0, 2, 0]))
    average = federated_average([upload], head, aggregation)
    assert all(
        torch.equal(average[name], value) and average[name].dtype == value.dtype for name, value in payload.items()
    )


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "norm_clipped_mean"])
def test_no_word_about_samples_counts_in_a_robust_average(aggregation):
    payloads = [{"w": torch.randn(3, 2), "head.bias": torch.randn(2)} for _ in range(5)]
    few, many = (
        [
            Upload(client=i, task=0, round=0, payload=p, class_counts=torch.tensor([1, 1]) * (factor if i == 3 else 1))
            for i, p in enumerate(payloads)
        ]
        for factor in (1, 10**9)
    )
    one, other = (federated_average(uploads, "classwise", aggregation) for uploads in (few, many))
    assert all(torch.equal(one[name], other[name]) for name in one)
