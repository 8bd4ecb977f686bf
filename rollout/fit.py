"""Whether a run fits a cluster, on which nodes, and what is short where it does not. Pure: no ray import."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rlattn.config import ConfigError
from rlattn.rollout.placement import Plan

Resources = Mapping[str, float]
KINDS = ("GPU", "CPU")
EPSILON = 1e-6  # parts of a GPU are floats


class NoRoom(ConfigError):
    """The run does not fit; the message names what is short."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster: what Ray may give away there, and its labels."""

    name: str
    resources: Resources
    labels: Mapping[str, str] = field(default_factory=dict)

    def has(self, labels: Mapping[str, str]) -> bool:
        """It carries all of `labels`."""
        return labels.items() <= self.labels.items()

    def describe(self) -> str:
        """Name and resources."""
        return f"{self.name} ({amounts(self.resources)})"


def alike(count: int, **resources: float) -> list[Node]:
    """`count` nodes with the same resources: a cluster on paper."""
    return [Node(f"node {i}", resources) for i in range(count)]


def fit(plan: Plan, nodes: Sequence[Node]) -> list[int]:
    """The node, as its place in `nodes`, of each bundle of the plan.

    Largest bundles first, each on a used node if one has room, else on the emptiest; Ray's PACK does the like, so
    actors will sit much as this says. With sizes that divide one another, as 1, 2, 4 and 8 GPUs do, it finds a place
    for all where there is one.

    Raises:
        NoRoom: no node has a bundle's labels, or is large enough for it, or all together are too small.
    """
    bundles, selectors = plan.bundles, plan.selectors
    left = [dict(node.resources) for node in nodes]
    places: dict[int, int] = {}
    order = sorted(range(len(bundles)), key=lambda b: (-len(selectors[b]), *(-bundles[b].get(k, 0) for k in KINDS), b))
    for bundle in order:
        asked = bundles[bundle]
        roomy = [i for i, node in enumerate(nodes) if node.has(selectors[bundle]) and _holds(left[i], asked)]
        if not roomy:
            raise NoRoom(_shortage(plan, nodes, bundle, len(places)))
        used = set(places.values())
        place = max(roomy, key=lambda i: (i in used, *(left[i].get(kind, 0) for kind in KINDS), -i))
        places[bundle] = place
        for kind, amount in asked.items():
            left[place][kind] -= amount
    return [places[bundle] for bundle in range(len(bundles))]


def describe_fit(plan: Plan, nodes: Sequence[Node], places: Sequence[int]) -> list[str]:
    """A line for each node that the run uses: who sits there."""
    lines = []
    for place, node in enumerate(nodes):
        names = [name for bundle, own in enumerate(places) if own == place for name in plan.actors(bundle)]
        if names:
            lines.append(f"{node.describe()}: {', '.join(ranges(names))}")
    return lines


def ranges(names: Iterable[str]) -> list[str]:
    """`policy rank 0, policy rank 1, policy rank 2` as `policy rank 0-2`, in order of first appearance."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        stem, number = re.fullmatch(r"(.*) (\d+)", name).groups()  # type: ignore[union-attr]  # every seat's name
        numbers.setdefault(stem, []).append(int(number))
    shown = []
    for stem, found in numbers.items():
        # In a run of neighbours a number and its place among all grow alike.
        runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(found)), lambda pair: pair[1] - pair[0])]
        spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
        shown.append(f"{stem} {','.join(spans)}")
    return shown


def amounts(resources: Resources) -> str:
    """`8 GPUs, 64 CPUs`."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in KINDS)


def _holds(left: Resources, asked: Resources) -> bool:
    return all(left.get(kind, 0) >= amount - EPSILON for kind, amount in asked.items())


def _shortage(plan: Plan, nodes: Sequence[Node], bundle: int, placed: int) -> str:
    """Why a bundle found no place."""
    asked, labels = plan.bundles[bundle], plan.selectors[bundle]
    who = " and ".join(plan.actors(bundle))
    if not nodes:
        return "the cluster has no nodes"
    fitting = [node for node in nodes if node.has(labels)]
    labelled = f" labelled {dict(labels)}" if labels else ""
    if not fitting:
        own = [{key: value for key, value in node.labels.items() if key != "ray.io/node-id"} for node in nodes]
        there = "; ".join(sorted({str(labels) for labels in own}))
        return f"no node is{labelled}, as {who} asks (ray.policy_labels, ray.rollout_labels); labels there: {there}"
    if not any(_holds(node.resources, asked) for node in fitting):
        largest = max(fitting, key=lambda node: [node.resources.get(kind, 0) for kind in KINDS])
        return f"{who} needs {amounts(asked)} on one node{labelled}; the largest is {largest.describe()}"
    rivals = [b for b, selector in enumerate(plan.selectors) if selector == labels]
    for kind in KINDS:
        wanted = sum(plan.bundles[b].get(kind, 0) for b in rivals)
        there_is = sum(node.resources.get(kind, 0) for node in fitting)
        if wanted > there_is + EPSILON:
            names = ", ".join(ranges(name for b in rivals for name in plan.actors(b)))
            return (
                f"{wanted - there_is:g} {kind}s short: {names} ask for {wanted:g}, and the {len(fitting)} "
                f"nodes{labelled} have {there_is:g}"
            )
    room = f"no node{labelled} has {amounts(asked)} left for {who}"
    return f"{placed} of {len(plan.bundles)} bundles have a place, then {room}"
