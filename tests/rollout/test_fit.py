"""What fits where, on paper: from one node of CPUs to 512 GPUs."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_tiny import run_config

from rlattn.rollout.fit import Node, NoRoom, alike, describe_fit, fit, ranges
from rlattn.rollout.placement import Plan, plan


def layout(ranks: int, engines: int, width: int = 1, **ray: Any) -> Plan:
    return plan(
        run_config(
            policy={"gpus_per_rank": 1, "ranks": ranks, "cpus_per_rank": 4},
            rollout={"num_engines": engines, "tensor_parallel_size": width, "num_generations": 2},
            trainer={"prompts_per_step": 256},
            ray=ray,
        )
    )


def used(made: Plan, nodes: list[Node], places: list[int]) -> list[Counter[str]]:
    """What is taken of each node."""
    taken = [Counter[str]() for _ in nodes]
    for bundle, place in zip(made.bundles, places, strict=True):
        taken[place].update(bundle)
    return taken


@pytest.mark.parametrize(
    ("nodes", "ranks", "engines", "width"),
    [(1, 4, 4, 1), (1, 4, 2, 2), (8, 32, 16, 2), (8, 32, 8, 4), (64, 256, 32, 8), (64, 384, 16, 8)],
)
def test_every_gpu_of_8_64_and_512_is_used_once(nodes: int, ranks: int, engines: int, width: int) -> None:
    made, cluster = layout(ranks, engines, width), alike(nodes, CPU=64, GPU=8)
    places = fit(made, cluster)
    assert made.gpus == 8 * nodes == ranks + engines * width
    assert all(taken == {"GPU": 8, "CPU": taken["CPU"]} for taken in used(made, cluster, places))
    wide = [place for bundle, place in zip(made.bundles, places, strict=True) if bundle["GPU"] == width > 1]
    assert len(wide) == (engines if width > 1 else 0)  # whole, on one node each
    assert sum(len(line.split(": ", 1)[1]) > 0 for line in describe_fit(made, cluster, places)) == nodes


def test_one_gpu_short_says_so() -> None:
    with pytest.raises(NoRoom, match=r"^1 GPUs short: policy rank 0-4, engine 0-3 ask for 9, and the 1 nodes have 8$"):
        fit(layout(5, 4), alike(1, CPU=64, GPU=8))


def test_too_wide_an_engine_names_the_largest_node() -> None:
    with pytest.raises(NoRoom, match=r"engine 0 needs 16 GPUs, 1 CPUs on one node; the largest is node 0 \(8 GPUs"):
        fit(layout(8, 1, 16), alike(4, CPU=64, GPU=8))


def test_labels_choose_nodes_and_their_lack_is_named() -> None:
    nodes = [Node("a", {"CPU": 64, "GPU": 8}, {"kind": "H100"}), Node("b", {"CPU": 64, "GPU": 8}, {"kind": "L40S"})]
    chosen = {"policy_labels": {"kind": "L40S"}, "rollout_labels": {"kind": "H100"}}
    assert fit(layout(2, 2, **chosen), nodes) == [1, 1, 0, 0]
    with pytest.raises(NoRoom, match=r"8 GPUs short: .* labelled \{'kind': 'L40S'\} have 8"):
        fit(layout(16, 2, **chosen), nodes)
    with pytest.raises(NoRoom, match=r"no node is labelled \{'kind': 'B200'\}, as .*rank 0 asks .* \{'kind': 'H100'\}"):
        fit(layout(2, 2, policy_labels={"kind": "B200"}), nodes)


def test_fragments_are_not_room() -> None:
    nodes = alike(2, CPU=64, GPU=3)
    with pytest.raises(NoRoom, match=r"2 of 3 bundles have a place, then no node has 2 GPUs, 1 CPUs left for engine 2"):
        fit(
            plan(
                run_config(policy={"gpus_per_rank": 1}, rollout={"num_engines": 3, "tensor_parallel_size": 2}),
                policy=False,
            ),
            nodes,
        )


def test_a_shared_gpu_holds_rank_critic_and_engine() -> None:
    config = run_config(
        policy={"gpus_per_rank": 0.3, "ranks": 8},
        rollout={"num_engines": 8, "num_generations": 8},
        algorithm={"name": "ppo"},
        ppo={"critic_gpus_per_rank": 0.3},
        ray={"placement": "colocate"},
    )
    assert fit(plan(config), alike(1, CPU=32, GPU=8)) == [0] * 8


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4),
)
def test_powers_of_two_are_placed_whenever_that_is_possible(sizes: list[int], rooms: list[int]) -> None:
    class Bare(Plan):
        bundles = [{"GPU": float(size)} for size in sizes]  # type: ignore[assignment]  # noqa: RUF012
        selectors = [{} for _ in sizes]  # type: ignore[assignment]  # noqa: RUF012

        def actors(self, bundle: int) -> list[str]:
            return [f"engine {bundle}"]

    nodes = [Node(f"n{i}", {"GPU": float(room)}) for i, room in enumerate(rooms)]
    possible = any(
        all(sum(s for s, p in zip(sizes, places, strict=True) if p == i) <= room for i, room in enumerate(rooms))
        for places in product(range(len(rooms)), repeat=len(sizes))
    )
    try:
        places = fit(Bare((), ()), nodes)
    except NoRoom:
        assert not possible
    else:
        taken = Counter(dict.fromkeys(range(len(rooms)), 0))
        for size, place in zip(sizes, places, strict=True):
            taken[place] += size
        assert all(taken[i] <= room for i, room in enumerate(rooms))


def test_ranges_are_for_people() -> None:
    names = ["policy rank 0", "policy rank 1", "policy rank 2", "engine 0", "policy rank 5"]
    assert ranges(names) == ["policy rank 0-2,5", "engine 0"]
