"""The parts of a prompt that the fusion reward compares with, and the work that is made of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from avatar_rl.actors.pending_group import PendingGroup, read_request_id
from avatar_rl.actors.scoring_loop import asked
from avatar_rl.actors.unimodal import parts_of
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.prompts.record import MediaItem, MediaPlan, Modality, ProblemType, Prompt


def prompt(*kinds: Modality, interleaved: bool = False) -> Prompt:
    items = tuple(MediaItem(kind=kind, uri=f"{index}.bin") for index, kind in enumerate(kinds))
    plan = MediaPlan(items=items, audio_in_video=interleaved)
    return Prompt(
        id="p",
        question="q",
        answer="1",
        problem_type=ProblemType.FREE_FORM,
        media=plan,
        hint="look",
    )


def kinds(parts: dict[str, Prompt]) -> dict[str, list[str]]:
    return {part: [item.kind for item in one.media.items] for part, one in parts.items()}


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_prompt_with_both_senses_is_asked_three_times(interleaved: bool) -> None:
    whole = prompt("video", "audio", interleaved=interleaved)
    parts = parts_of(whole, unimodal=True)
    assert kinds(parts) == {"": ["video", "audio"], "video": ["video"], "audio": ["audio"]}
    assert (
        parts[""] is whole and next(iter(parts)) == ""
    )  # first, since the others are never longer
    for name in ("video", "audio"):
        assert not parts[name].media.audio_in_video
        assert (
            parts[name].model_copy(update={"media": whole.media}) == whole
        )  # question, truth and hint as they were


def test_pictures_are_sight_too() -> None:
    assert kinds(parts_of(prompt("image", "audio", "video"), unimodal=True))["video"] == [
        "image",
        "video",
    ]


@pytest.mark.parametrize("given", [(), ("video",), ("audio", "audio"), ("video", "image")])
def test_a_prompt_without_one_of_them_is_asked_once(given: tuple[Modality, ...]) -> None:
    assert list(parts_of(prompt(*given), unimodal=True)) == [""]


def test_nobody_asks_for_parts_without_the_reward() -> None:
    assert list(parts_of(prompt("video", "audio"), unimodal=False)) == [""]


def finished(texts: list[str]) -> Any:
    parts = [
        SimpleNamespace(
            text=t,
            finish_reason="stop",
            token_ids=np.arange(len(t)),
            logprobs=np.full(len(t), -1.0),
        )
        for t in texts
    ]
    return SimpleNamespace(completions=tuple(parts))


def test_a_group_is_done_with_all_its_parts_and_goes_to_the_scorer_as_one() -> None:
    request = RolloutRequest(seq=7, prompt_id="p", step=1, n=2)
    lease = RequestLease(request=request, attempt=1, consumer="a", hinted=False)
    work = PendingGroup(lease, prompt("video", "audio"), {"": 0, "video": 1, "audio": 2})
    assert work.sequences == 6
    assert [read_request_id(name) for name in work.request_ids] == [
        (request.key, part) for part in work.prepared
    ]
    work.finished["audio"] = finished(["cc", "c"])
    work.finished[""] = finished(["aaa", "aaaa"])
    assert not work.done
    work.finished["video"] = finished(["b", "bb"])
    assert work.done and work.tokens == 3 + 4 + 3 + 3 and work.whole is work.finished[""]
    prompt_id, facts, unimodal = asked(work)
    assert (prompt_id, [text for text, *_ in facts]) == ("p", ["aaa", "aaaa"])
    assert {part: [text for text, *_ in found] for part, found in unimodal.items()} == {
        "video": ["b", "bb"],
        "audio": ["cc", "c"],
    }
    plain = PendingGroup(lease, prompt("video"), {"": 0}, {"": finished(["a", "b"])})
    assert plain.sequences == 2 and plain.done and len(asked(plain)) == 2
