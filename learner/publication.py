"""The policy out of the learner under its published names: to rollout actors by one of the roads,
and to a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
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
from avatar_rl.learner.adapter.base import BaseRecord
from avatar_rl.learner.adapter.files import ADAPTER, export_adapter
from avatar_rl.learner.adapter.lora import merged_name
from avatar_rl.learner.engine import TrainEngine
from avatar_rl.learner.model.export import export_checkpoint
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


class Publication:
    """Streams the policy by layers, so that no rank holds a second copy of it.

    Its methods are collective under ZeRO 3. ``sender`` is rank 0's, which alone does something with
    the tensors; ``road`` is there where versions travel otherwise than by the board."""

    def __init__(
        self,
        engine: TrainEngine,
        names: NameMap,
        sender: WeightSender | None = None,
        road: Road | None = None,
    ) -> None:
        self.engine, self.names, self.sender, self.road = engine, names, sender, road

    def publish(self, version: int) -> None:
        """Send ``version`` to the rollout actors, or offer it to the weight store. Raises
        ModelError when that does not take the version before."""
        if self.road is not None:
            self.road.publish(version, self._stream)
            return
        sender = self.sender

        def send(parts: Iterator[dict[str, Tensor]]) -> None:
            if sender is not None:
                sender.publish(version, parts)

        self._stream(send)

    def export(self, base: Path, out: Path) -> None:
        """Write the checkpoint ``out`` with the companions of ``base``, in the serving dtype."""
        sender = self.sender

        def write(parts: Iterator[dict[str, Tensor]]) -> None:
            if sender is not None:
                export_checkpoint((_cast(part, sender.dtype) for part in parts), base, out)

        self._stream(write)

    def _stream(
        self,
        take: Callable[[Iterator[dict[str, Tensor]]], None],
        names: NameMap | None = None,
    ) -> None:
        """Hand published tensors to ``take``, part by part: the parameters themselves, or views of
        them, valid until the next is asked for. ``names``: of some of them."""
        chosen = self.names if names is None else names
        weights = self.engine.whole_weights(chosen.parts)
        try:
            take(chosen.publish(weights))
        finally:
            for _ in weights:  # a rank that takes none, or fails, still gathers with the others
                pass

    def put_again(self) -> int:
        """Offer the last version to a weight store that lost it; its number, 0 where there is
        none."""
        return self.sender.put_again() if self.sender is not None else 0

    def metrics(self) -> dict[str, float]:
        """How the last version travelled; rank 0's."""
        return self.road.metrics() if self.road is not None else {}


class AdapterPublication(Publication):
    """The policy of a LoRA run: merged to rollout actors, or with ``adapter_only`` the adapter
    itself; merged and as an adapter of ``base`` to a folder."""

    def __init__(
        self,
        engine: TrainEngine,
        names: NameMap,
        sender: WeightSender | None,
        *,
        base: BaseRecord,
        adapter_only: bool,
        road: Road | None = None,
    ) -> None:
        super().__init__(engine, names, sender, road)
        self.base, self.adapter_only = base, adapter_only

    def publish(self, version: int) -> None:
        """As ``Publication.publish``."""
        if not self.adapter_only:
            super().publish(version)
            return
        parts = self.engine.adapter_weights()
        try:
            if self.sender is not None:
                self.sender.publish(version, (published_adapter(p, self.names) for p in parts))
        finally:
            for _ in parts:
                pass

    def export(self, base: Path, out: Path) -> None:
        """As ``Publication.export``; below it the adapter as PEFT reads it."""
        super().export(base, out)
        tensors, adapter = self.engine.adapter_state(), self.engine.adapter
        if self.sender is not None and adapter is not None:
            cast = _cast(tensors, self.sender.dtype)
            export_adapter(cast, adapter.settings, self.base, out / ADAPTER)


def published_adapter(tensors: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """An adapter's tensors under the published names of their layers."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, side = name.partition(".lora_")
        published = names.published_name(f"{layer}.weight").removesuffix(".weight")
        found[f"{published}.lora_{side}"] = tensor
    return found


def _cast(part: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """On the host, floats in ``dtype``."""
    return {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else None)
        for name, tensor in part.items()
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
