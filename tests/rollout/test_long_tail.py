"""Which groups are kept of more than are needed: tokens decide, not time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlattn.rollout.long_tail import Shortest

SIZE = 2


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_the_same_groups_whatever_order_completions_come_in(groups, keep, random) -> None:
    keep = min(keep, len(groups))
    expected = sorted(sorted(range(len(groups)), key=lambda g: (max(groups[g]), g))[:keep])
    tokens = {SIZE * g + i: length for g, pair in enumerate(groups) for i, length in enumerate(pair)}
    order = list(tokens)
    random.shuffle(order)
    kept, cut = Shortest(SIZE, keep), set()
    bounds = []
    for number in order:
        bound = kept.longest()
        if bound is not None:
            bounds.append(bound)
            cut |= {n // SIZE for n in tokens if n not in kept_numbers(kept) and tokens[n] > bound}
        if number // SIZE not in cut:
            kept.add({number: tokens[number]})
    assert kept.groups() == expected
    assert not cut & set(expected)
    assert bounds == sorted(bounds, reverse=True)  # what was cut once would be cut later


def kept_numbers(kept: Shortest) -> set[int]:
    return {SIZE * group + i for group, lengths in kept._lengths.items() for i in range(len(lengths))}


def test_the_bound_is_known_once_enough_groups_are_finished() -> None:
    kept = Shortest(2, 1)
    kept.add({0: 5})
    assert kept.longest() is None
    kept.add({1: 7, 2: 3})
    assert (kept.longest(), kept.groups()) == (7, [0])
    kept.add({3: 4})
    assert (kept.longest(), kept.groups()) == (4, [1])
    kept.add({4: 4, 5: 4})  # as long as the best: the first asked stays
    assert kept.groups() == [1]
