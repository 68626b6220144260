"""Where actors go: the learner's placement group, and what to say when Ray cannot place something
in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from avatar_rl.common.errors import ResourceError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


class Node(TypedDict):
    """What is used of Ray's row of a node."""

    NodeID: str
    NodeManagerAddress: str
    Alive: bool
    Labels: dict[str, str]
    Resources: dict[str, float]


def reserve(
    bundles: list[dict[str, float]], labels: Mapping[str, str], *, strict: bool, deadline_s: float
) -> PlacementGroup:
    """A placement group with a bundle for each learner rank, on one node if they fit there.

    ``strict``: on one node or not at all. Raises ResourceError naming what is missing when it is
    not placed within ``deadline_s`` seconds.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    selectors = [dict(labels)] * len(bundles) if labels else None
    strategy = "STRICT_PACK" if strict else "PACK"
    group = placement_group(bundles, strategy=strategy, bundle_label_selector=selectors)
    try:
        ray.get(group.ready(), timeout=deadline_s)
    except ray.exceptions.GetTimeoutError as error:
        remove_placement_group(group)
        where = " on one node" if strict else ""
        raise ResourceError(
            f"{len(bundles)} learner ranks were not placed within {deadline_s:g} s: "
            f"{missing(bundles, labels, strict=strict)}; {shortage()}. Lower learner.ranks or "
            f"resources.learner_*, or add a node that has them free{where}"
        ) from error
    return group


def release(group: PlacementGroup) -> None:
    """Give a group's resources back; its actors must be gone."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def missing(bundles: list[dict[str, float]], labels: Mapping[str, str], *, strict: bool) -> str:
    """Which resource of ``bundles`` is short, on the nodes that carry ``labels``."""
    nodes = [node for node in live_nodes() if labels.items() <= node["Labels"].items()]
    if not nodes:
        return "no node carries the label " + ", ".join(
            f"{name}={value}" for name, value in labels.items()
        )
    names = sorted({name for bundle in bundles for name in bundle})
    short = []
    for name in names:
        needed = sum(bundle.get(name, 0) for bundle in bundles)
        have = [node["Resources"].get(name, 0.0) for node in nodes]
        there = max(have) if strict else sum(have)
        if needed > there:
            short.append(
                f"{needed:g} {name} needed{' on one node' if strict else ''}, {there:g} there"
            )
    return (
        "; ".join(short)
        or "enough is there in all, but other actors hold it or it is split over nodes"
    )


def shortage() -> str:
    """What the cluster has and what of it is free, for a message."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{free.get(name, 0):g} of {have.get(name, 0):g} {name} free" for name in ("CPU", "GPU")
    ]
    return f"the cluster has {len(live_nodes())} node(s), {', '.join(parts)}"


def live_nodes() -> list[Node]:
    """Ray's rows of the nodes that are alive, in a stable order."""
    import ray

    nodes: list[Node] = ray.nodes()
    return sorted(
        (node for node in nodes if node["Alive"]),
        key=lambda node: str(node["NodeManagerAddress"]),
    )
