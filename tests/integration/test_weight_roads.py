"""Versions that go to all members at once: groups, tokens, what is refused, and who takes the
board."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.ipc_handles import from_plain, to_plain
from avatar_rl.buffer_service.weights.links import GlooMember, GlooSender, PartSource, open_store
from avatar_rl.buffer_service.weights.member import Member, MemberSettings, Pairs
from avatar_rl.buffer_service.weights.news import Noticeboard
from avatar_rl.buffer_service.weights.receiver import WeightReceiver
from avatar_rl.buffer_service.weights.road_receiver import HeldWeights, RoadReceiver
from avatar_rl.buffer_service.weights.road_sender import Pass, RoadSender
from avatar_rl.buffer_service.weights.staging import Staging
from avatar_rl.buffer_service.weights.transfer_client import TransferError
from avatar_rl.common.errors import ModelError

CONFIG, RUN_ID = BufferConfig(), "roads"
PARTS: dict[Pass, list[dict[str, Tensor]]] = {
    "fixed": [{"still": torch.full((5, 3), 7.0), "count": torch.arange(4)}],
    "changing": [{"a": torch.zeros(1000), "none": torch.zeros(0, 2)}, {"b": torch.zeros(3, 7)}],
}
PARTS["board"] = [*PARTS["fixed"], *PARTS["changing"]]


class Board:
    """The weight store's side, as far as the sender goes: versions that came to it."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.versions: list[int] = []

    def publish(self, version: int, parts: Iterable[Mapping[str, Tensor]]) -> int:
        assert {name for part in parts for name in part} == {"still", "count", "a", "none", "b"}
        self.versions.append(version)
        return 0


class Hub:
    """A Redis with a sender and members in this process."""

    def __init__(self, redis: EmbeddedRedis) -> None:
        self.url = redis.url
        self.buffer = ReplayBuffer.connect(CONFIG, RUN_ID, redis.url)
        self.members: dict[str, Member] = {}
        self.board = Board()
        self.reasons: list[str] = []
        self.phases: list[str] = []
        self.open = [self.notices()]

    def notices(self) -> Noticeboard:
        return Noticeboard(CONFIG, RUN_ID, self.url)

    def sender(self, board_every: int = 1000) -> RoadSender:
        store = open_store()
        return RoadSender(
            self.notices(),
            self.board,
            PARTS,
            lambda client, source: GlooSender(client, source, store),
            board_every=board_every,
            on_phase=self.phases.append,
            on_fallback=lambda version, why: self.reasons.append(f"{version}: {why}"),
        )

    def join(self, name: str, check: Callable[[Pairs], Pairs] = list) -> Member:
        staging = Staging()
        settings = MemberSettings(name, CONFIG, RUN_ID, self.url)
        member = Member(settings, staging, GlooMember(staging), check=check)
        member.start()
        self.members[name] = member
        self.until(lambda: name in self.open[0].members())
        return member

    def publish(self, sender: RoadSender, version: int, value: float) -> str:
        """Send ``version``; the token that was sealed."""
        for part in PARTS["changing"]:
            for tensor in part.values():
                tensor.fill_(value)
        for kind in sender.passes(version):
            sender.send(kind, iter(PARTS[kind]))
        sealed = self.open[0].sealed()
        assert sealed is not None and sealed.version == version
        return sealed.token

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


@pytest.fixture
def hub(redis: EmbeddedRedis) -> Iterator[Hub]:
    hub = Hub(redis)
    yield hub
    for member in hub.members.values():
        member.close()
    hub.buffer.clear()


def loaded(member: Member, version: int, token: str) -> dict[str, Tensor] | None:
    """What the member's engine would have."""
    if not member.reserve(version, token):
        return None
    found: dict[str, Tensor] = {}
    member.load(lambda pairs: found.update({name: t.clone() for name, t in pairs}))
    return found


def test_a_version_reaches_all_members_and_what_never_changes_is_sent_once(hub: Hub) -> None:
    first, second, sender = hub.join("one/0"), hub.join("two/0"), hub.sender()
    for version in (1, 2):
        token = hub.publish(sender, version, value=version)
        for member in (first, second):
            found = loaded(member, version, token)
            assert found is not None and set(found) == {"still", "count", "a", "none", "b"}
            assert found["still"].tolist() == [[7.0] * 3] * 5
            assert found["count"].tolist() == [0, 1, 2, 3]
            assert set(found["a"].tolist()) | set(found["b"].flatten().tolist()) == {version}
            assert loaded(member, version, token) is None  # it was handed over
    assert hub.phases.count("sending") == 3  # fixed, and twice what changes
    assert (sender.stats.formations, sender.stats.members, hub.board.versions) == (1, 2, [])
    hub.join("three/0")
    token = hub.publish(sender, 3, value=3)
    assert sender.stats.formations == 2 and loaded(hub.members["three/0"], 3, token) is not None
    second.close()
    hub.publish(sender, 4, value=4)
    assert (sender.stats.formations, sender.stats.members, hub.reasons) == (3, 2, [])
    sender.close()


def test_only_what_was_sealed_last_is_handed_on_once_it_is_committed(hub: Hub) -> None:
    member, died, sender = hub.join("one/0"), hub.sender(), hub.sender()
    board = cast("Any", WeightReceiver(cast("Any", None), 0))
    receiver = RoadReceiver(hub.notices(), board, {"one/0"})
    before = hub.publish(died, 1, value=1)  # its learner dies before the commit ...
    died.close()
    after = hub.publish(sender, 1, value=5)  # ... and another trains the step again
    assert loaded(member, 1, before) is None
    hub.buffer.replay.publish_version(1)
    version, held = next(receiver.updates(hub.buffer, lambda: True))
    assert (version, held) == (1, HeldWeights(after))
    found = loaded(member, 1, after)
    assert found is not None and set(found["a"].tolist()) == {5.0}
    sender.close()


def test_what_a_member_refuses_takes_the_board_and_the_reason_is_told(hub: Hub) -> None:
    def check(pairs: Pairs) -> Pairs:
        found = list(pairs)
        if any(bool(tensor.isnan().any()) for _, tensor in found if tensor.is_floating_point()):
            raise ModelError("'a' holds NaN")
        return found

    member, sender = hub.join("one/0", check), hub.sender()
    good = hub.publish(sender, 1, value=1)
    bad = hub.publish(sender, 2, value=float("nan"))
    assert hub.board.versions == [2] and sender.stats.members == 0
    assert len(hub.reasons) == 1 and "'a' holds NaN" in hub.reasons[0]
    assert loaded(member, 2, bad) is None and loaded(member, 1, good) is not None
    hub.publish(sender, 3, value=3)  # the road is open again
    assert sender.stats.members == 1 and hub.board.versions == [2]
    sender.close()


def test_who_is_no_member_takes_the_board_and_the_board_has_every_nth_version(hub: Hub) -> None:
    class FromBoard:
        version = refused = 0

        def next_update(self, *_: object) -> tuple[int, dict[str, Tensor]]:
            return 2, {"a": torch.ones(1)}

    hub.join("one/0")
    sender = hub.sender(board_every=2)
    hub.publish(sender, 1, value=1)
    hub.publish(sender, 2, value=2)
    assert hub.board.versions == [2]
    hub.buffer.replay.publish_version(2)
    receiver = RoadReceiver(hub.notices(), cast("Any", FromBoard()), {"two/0"})
    version, weights = next(receiver.updates(hub.buffer, lambda: True))
    assert version == 2 and isinstance(weights, dict)
    sender.close()


def test_a_source_that_is_not_its_layout_is_refused() -> None:
    source = PartSource([{"a": torch.zeros(2)}, {"b": torch.zeros(1)}], torch.bfloat16)
    source.feed(iter([{"a": torch.ones(2)}, {"b": torch.ones(1)}]))
    assert [(name, t.dtype) for name, t in source] == [("a", torch.bfloat16), ("b", torch.bfloat16)]
    source.feed(iter([{"a": torch.ones(2)}, {"c": torch.ones(1)}]))
    with pytest.raises(TransferError, match="'b' is missing from a transfer"):
        list(source)


def test_staging_uses_its_memory_again_and_knows_what_did_not_come() -> None:
    staging = Staging()
    manifest = {"a": ((3,), "float32"), "b": ((2, 2), "bfloat16")}
    staging.expect(manifest, 0)
    staging.load_weights([("a", torch.ones(3))])
    with pytest.raises(KeyError, match="b"):
        staging.taken()
    staging.load_weights([("b", torch.full((2, 2), 2.0))])
    found, memory = staging.taken()
    assert found["a"].tolist() == [1, 1, 1] and found["b"].dtype == torch.bfloat16
    assert memory is not None
    staging.give_back(memory)
    staging.expect(manifest, 0)
    staging.load_weights([("a", torch.ones(3)), ("b", torch.ones(2, 2))])
    assert staging.taken()[1] is memory


def test_handles_travel_without_classes() -> None:
    arguments = (
        torch.Tensor,
        torch.Size([8]),
        (1,),
        0,
        torch.storage.TypedStorage,
        torch.uint8,
        0,
        b"handle",
        8,
        0,
        False,
        b"counter",
        0,
        b"event",
        True,
    )
    assert from_plain(to_plain({"GPU-1": arguments})) == {"GPU-1": arguments}
    with pytest.raises(ValueError, match=r"set weights\.transport to board"):
        to_plain({"GPU-1": (torch.nn.Parameter, *arguments[1:])})


def test_members_of_an_actor_that_ended_are_buried_and_a_living_one_comes_back(hub: Hub) -> None:
    hub.join("rollout-1/0")
    hub.join("rollout-10/0")
    hub.open[0].forget("rollout-1")
    assert "rollout-10/0" in hub.open[0].members()
    hub.until(lambda: "rollout-1/0" in hub.open[0].members())  # it lives, and shows itself
