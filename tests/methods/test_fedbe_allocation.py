from hypothesis import given
from hypothesis import strategies as st

from fedlscl.methods.fedbe import allocate, kl_divergence


@st.composite
def cases(draw):
    """Importance, class counts and capacities of some clients, and beta."""
    clients, blocks, classes = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    importance = [[draw(st.sampled_from([0.0, 0.001, 0.5, 1.0])) for _ in range(blocks)] for _ in range(clients)]
    counts = [[draw(st.integers(0, 30)) for _ in range(classes)] for _ in range(clients)]
    capacities = [draw(st.integers(1, blocks)) for _ in range(clients)]
    return importance, counts, capacities, draw(st.sampled_from([0.0, 0.1, 10.0]))


@given(cases())
def test_every_client_gets_as_many_distinct_blocks_as_it_can_train(case):
    importance, _, capacities, _ = case
    chosen = allocate(*case)
    assert [len(set(blocks)) for blocks in chosen] == capacities == [len(blocks) for blocks in chosen]
    assert all(set(blocks) <= set(range(len(importance[0]))) for blocks in chosen)


@given(cases())
def test_every_block_is_covered_where_capacity_allows(case):
    importance, _, capacities, _ = case
    covered = {block for blocks in allocate(*case) for block in blocks}
    assert len(covered) == min(sum(capacities), len(importance[0]))


@given(cases())
def test_allocation_is_a_function_of_its_arguments(case):
    assert allocate(*case) == allocate(*case)


@given(cases(), st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_equal_shares_leave_importance_alone_to_decide(case, sizes):
    """Clients of different size with the same label distribution diverge by exactly zero."""
    importance, counts, capacities, _ = case
    same = [[size * n for n in counts[0]] for size in sizes[: len(counts)]]
    assert allocate(importance, same, capacities, 1e9) == allocate(importance, same, capacities, 0.0)


def test_ties_go_to_the_lowest_index():
    """Client 0 first, block 0 first, round by round: both clients take a free block each time."""
    nothing = [[1.0] * 4] * 2
    assert allocate(nothing, [[5, 5]] * 2, [2, 2], 0.1) == [[0, 2], [1, 3]]
    assert allocate(nothing, [[5, 5]] * 2, [3, 3], 0.1) == [[0, 1, 2], [0, 1, 3]]


def test_clients_of_large_capacity_choose_first():
    assert allocate([[0.0, 1.0], [0.0, 1.0]], [[1], [1]], [1, 2], 0.0) == [[0], [0, 1]]


def test_labels_are_spread_over_blocks():
    """With one block per client and two of each kind, the second of a kind joins the other kind's block."""
    counts = [[9, 0], [0, 9], [9, 0], [0, 9]]
    assert allocate([[1.0, 1.0]] * 4, counts, [1] * 4, 0.1) == [[0], [1], [1], [0]]
    prefers = [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert allocate(prefers, counts, [1] * 4, 0.1)[2] == [0]


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3), st.integers(1, 9))
def test_divergence_is_zero_for_equal_shares_exactly(counts, factor):
    assert kl_divergence([factor * n for n in counts], counts) == 0.0
    assert kl_divergence([0, 0, 0], counts) == 0.0


@given(st.lists(st.integers(1, 50), min_size=3, max_size=3), st.lists(st.integers(1, 50), min_size=3, max_size=3))
def test_divergence_is_not_negative(counts, others):
    assert kl_divergence(counts, [a + b for a, b in zip(counts, others, strict=True)]) > -1e-12
