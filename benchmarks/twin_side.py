"""The gloo twin of the NCCL road under kills and on the clock: Ray actors that do what the
learner's rank 0 and the rollout actors' workers do, and end themselves by SIGKILL where they are
told.

A version's tensors all hold one number, made of the version and of the sender's own number. So a
mix of two versions, or of two senders' tries at one version, shows itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.links import GlooMember, GlooSender, open_store
from avatar_rl.buffer_service.weights.member import Member, MemberSettings, Pairs
from avatar_rl.buffer_service.weights.news import Noticeboard
from avatar_rl.buffer_service.weights.receiver import WeightReceiver
from avatar_rl.buffer_service.weights.road_receiver import HeldWeights, RoadReceiver
from avatar_rl.buffer_service.weights.road_sender import Pass, RoadSender
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.buffer_service.weights.staging import Staging

RUN_ID = "twin"
PARTS, TENSORS = 4, 8  # of what changes; tensors in each part
FIXED = 7.5  # in tensors that never change
SENDERS = 1 << 10  # numbers of senders that a float32 tells apart beside a version
#: Every step at which a process may end, in order; of the sender, then of a member.
SENDER_PHASES = (
    "calling",
    "forming",
    "formed",
    "sending",
    "part 0",
    "part 2",
    "sent",
    "staged",
    "sealed",
    "committed",
)
MEMBER_PHASES = (
    "called",
    "forming",
    "joined",
    "receiving",
    "received",
    "checking",
    "staged",
    "adopting",
    "adopted",
    "idle",
)


class Fuse:
    """Ends the process at a phase."""

    def __init__(self) -> None:
        self.phase = ""

    def __call__(self, phase: str) -> None:
        if phase == self.phase:
            os.kill(os.getpid(), signal.SIGKILL)


def parts(size: int) -> dict[Pass, list[dict[str, Tensor]]]:
    """``size`` bytes of tensors, a fifth of which never changes."""
    count = max(1, size // 4 // (5 * PARTS // 4 * TENSORS))
    changing = [{f"part{p}.w{i}": torch.zeros(count) for i in range(TENSORS)} for p in range(PARTS)]
    fixed = [{f"still.w{i}": torch.full((count,), FIXED) for i in range(TENSORS)}]
    return {"fixed": fixed, "changing": changing, "board": [*fixed, *changing]}


class TwinSource:
    """Rank 0."""

    def __init__(
        self, weight_store: Any, size: int, url: str, number: int, board_every: int
    ) -> None:
        torch.set_num_threads(1)
        self.number, self.fuse = number, Fuse()
        self.parts = parts(size)
        self.buffer = ReplayBuffer.connect(BufferConfig(), RUN_ID, url)
        self.outbox = Outbox(weight_store)
        layout = {name: t for part in self.parts["board"] for name, t in part.items()}
        store = open_store()
        self.roads = RoadSender(
            Noticeboard(BufferConfig(), RUN_ID, url),
            WeightSender(layout, self.outbox, dtype="float32"),
            self.parts,
            lambda client, source: GlooSender(client, source, store),
            board_every=board_every,
            on_phase=self.fuse,
        )

    def members(self) -> int:
        """Those that are there."""
        return len(self.roads.board.members())

    def publish(self, version: int, die_at: str = "", *, commit: bool = True) -> dict[str, float]:
        """Send ``version`` and commit it. What it cost: when it began, and how long it took."""
        self.fuse.phase = die_at
        for part in self.parts["changing"]:
            for tensor in part.values():
                tensor.fill_(version + self.number / SENDERS)
        start = time.monotonic()
        for kind in self.roads.passes(version):
            self.roads.send(kind, _looked_at(self.parts[kind]))
        if commit:
            # Nobody else commits: whoever reads the version afterwards reads this, too.
            self.buffer.control.set_value("content", {"version": version, "sender": self.number})
            self.buffer.replay.publish_version(version)
        self.fuse("committed")
        stats = self.roads.stats
        return {
            "start": start,
            "pause": time.monotonic() - start,
            "members": stats.members,
            "formations": stats.formations,
            "fallbacks": stats.fallbacks,
        }


def _looked_at(given: list[dict[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    """Parts as the learner gives them: each until the next is asked for."""
    yield from given


class TwinReader:
    """A rollout actor with one worker, and a state dict for its engine."""

    def __init__(self, weight_store: Any, size: int, url: str, name: str) -> None:
        torch.set_num_threads(1)
        self.fuse = Fuse()
        self.state = {n: torch.zeros_like(t) for p in parts(size)["board"] for n, t in p.items()}
        self.buffer = ReplayBuffer.connect(BufferConfig(), RUN_ID, url)
        staging = Staging()
        settings = MemberSettings(f"{name}/0", BufferConfig(), RUN_ID, url)
        self.member = Member(settings, staging, GlooMember(staging), check=list, on_phase=self.fuse)
        notices = Noticeboard(BufferConfig(), RUN_ID, url)
        board = WeightReceiver(weight_store, 0)
        self.receiver = RoadReceiver(notices, board, {settings.name})
        self.version, self.adopted_at, self.mixed, self.adoptions = 0, 0.0, 0, 0
        self._running = True
        self._changed = threading.Condition()
        self.member.start()
        threading.Thread(target=self._follow, daemon=True).start()

    def arm(self, phase: str) -> None:
        """End at ``phase``."""
        self.fuse.phase = phase
        self.fuse("idle")

    def until(self, version: int, wait_s: float) -> dict[str, float]:
        """What it has, as soon as that is ``version`` or newer, or after ``wait_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self.version >= version, wait_s)
        return {
            "version": self.version,
            "at": self.adopted_at,
            "mixed": self.mixed,
            "adoptions": self.adoptions,
            "by_road": self.receiver.by_road,
        }

    def _follow(self) -> None:
        for version, weights in self.receiver.updates(self.buffer, lambda: self._running):
            if isinstance(weights, HeldWeights):
                if not self.member.reserve(version, weights.token):
                    continue
                self.member.load(self._load)
            else:
                self.fuse("adopting")
                self._load(weights.items())
            self.fuse("adopted")
            self._look_at(version)

    def _load(self, pairs: Pairs) -> None:
        for name, tensor in pairs:
            self.state[name].copy_(tensor)

    def _look_at(self, version: int) -> None:
        """Every tensor is that of ``version``, as the sender that committed it had it."""
        content = self.buffer.control.get_value("content")
        values = {
            (name.startswith("still"), float(extreme))
            for name, tensor in self.state.items()
            for extreme in torch.aminmax(tensor)
        }
        changing = {value for still, value in values if not still}
        good = (True, FIXED) in values and len(values) == 2 and len(changing) == 1
        if good and content["version"] == version:
            good = changing == {version + content["sender"] / SENDERS}
        good = good and all(int(value) == version for value in changing)
        with self._changed:
            self.mixed += not good
            self.adoptions += 1
            self.version, self.adopted_at = version, time.monotonic()
            self._changed.notify_all()
