"""The road of a version from the learner's ranks: what is streamed, in which order, by which
link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avatar_rl.buffer_service.control import RunControl
from avatar_rl.buffer_service.weights.block import DTYPES
from avatar_rl.buffer_service.weights.links import GlooSender, open_store
from avatar_rl.buffer_service.weights.news import Noticeboard
from avatar_rl.buffer_service.weights.road_sender import PASSES, OpenLink, Pass, RoadSender
from avatar_rl.buffer_service.weights.sender import WeightSender
from avatar_rl.buffer_service.weights.vllm_links import IpcFollower, open_ipc, open_nccl
from avatar_rl.learner.adapter.lora import merged_name
from avatar_rl.learner.model.names import NameMap
from avatar_rl.learner.spec import LearnerSpec

Take = Callable[[Iterator[dict[str, Tensor]]], None]


class Stream(Protocol):
    """``Publication._stream``: hands the published tensors of a map to a function, on all ranks."""

    def __call__(self, take: Take, names: NameMap | None = None) -> None: ...


class Road:
    """Streams what rank 0 says, pass by pass. ``sender`` is rank 0's; ``follower`` that of other
    ranks, where the link asks something of them."""

    def __init__(
        self,
        names: dict[Pass, NameMap],
        sender: RoadSender | None,
        follower: IpcFollower | None = None,
    ) -> None:
        self.names, self.sender, self.follower = names, sender, follower

    def publish(self, version: int, stream: Stream) -> None:
        """All passes of ``version``; collective. Raises ModelError where the weight store takes it
        not."""
        passes = self.sender.passes(version) if self.sender is not None else iter(())
        while (kind := _agreed(next(passes, None))) is not None:
            stream(self._taker(kind), self.names[kind])

    def _taker(self, kind: Pass) -> Take:
        def take(parts: Iterator[dict[str, Tensor]]) -> None:
            if self.sender is not None:
                self.sender.send(kind, parts)
            elif self.follower is not None and kind != "board":
                self.follower.send(self.names[kind].layouts, parts)

        return take

    def metrics(self) -> dict[str, float]:
        """Of the last version, and since the ranks began."""
        if self.sender is None:
            return {}
        stats = self.sender.stats
        return {
            "weights/members": float(stats.members),
            "weights/groups_formed": float(stats.formations),
            "weights/fallbacks": float(stats.fallbacks),
        }


def open_road(
    spec: LearnerSpec, policy: nn.Module, names: NameMap, sender: WeightSender | None, dtype: str
) -> Road:
    """The road that ``spec.transport`` names; ``sender`` is rank 0's, ``dtype`` that of the
    engines."""
    changing, fixed = names.split(changing_tensors(policy))
    maps: dict[Pass, NameMap] = {"fixed": fixed, "changing": changing, "board": names}
    if sender is None:
        return Road(maps, None, IpcFollower(DTYPES[dtype]) if spec.transport == "ipc" else None)
    control = RunControl.at(spec.buffer, spec.run_id, spec.redis_url)
    control.set_value("weights/fallback", None)  # of a run that is resumed
    roads = RoadSender(
        Noticeboard(spec.buffer, spec.run_id, spec.redis_url),
        sender,
        {kind: maps[kind].layouts for kind in PASSES},
        _opener(spec.transport),
        board_every=spec.board_every,
        last=spec.steps,
        on_fallback=lambda version, why: control.set_value(
            "weights/fallback", {"version": version, "why": why}
        ),
    )
    return Road(maps, roads)


def _opener(transport: str) -> OpenLink:
    if transport == "nccl":
        return open_nccl
    if transport == "ipc":
        return open_ipc
    store = open_store()
    return lambda client, source: GlooSender(client, source, store)


def changing_tensors(policy: nn.Module) -> set[str]:
    """Our names of the tensors that training may change: all but frozen parameters. With an adapter
    those that it is merged into."""
    state = {
        name.removeprefix("model."): t for name, t in policy.state_dict(keep_vars=True).items()
    }
    return {
        merged_name(name)
        for name, tensor in state.items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


def _agreed(kind: Pass | None) -> Pass | None:
    """What rank 0 says, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return kind
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    number = torch.tensor([-1 if kind is None else PASSES.index(kind)], device=device)
    dist.broadcast(number, 0)
    found = int(number.item())
    return None if found < 0 else PASSES[found]
