"""A group on its way: the parts that the fusion reward compares with, what goes to the scorer, and
what is made of the scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from avatar_rl.actors.groups import (
    PendingGroup,
    UnusableGroupError,
    completions_of,
    evaluation_payload,
    make_group,
    parts_of,
    read_request_id,
)
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.buffer_service.records.validate import check_group
from avatar_rl.common.errors import DataError
from avatar_rl.common.scoring import Completion, CompletionScore
from avatar_rl.prompts.record import MediaItem, MediaPlan, Modality, ProblemType, Prompt

LEASE = RequestLease(
    request=RolloutRequest(seq=3, prompt_id="p", step=1, n=3),
    attempt=1,
    consumer="rollout-0",
    hinted=False,
)
SCORED = CompletionScore(
    reward=0.5, components={"accuracy": 0.5}, details={"judge/visual_id_score": 0.25}
)
MASKED = CompletionScore(reward=None, components={"accuracy": None})


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
def test_a_prompt_with_both_modalities_is_asked_three_times(interleaved: bool) -> None:
    whole = prompt("video", "audio", interleaved=interleaved)
    parts = parts_of(whole, unimodal=True)
    assert kinds(parts) == {"": ["video", "audio"], "video": ["video"], "audio": ["audio"]}
    # first, since the others are never longer
    assert parts[""] is whole and next(iter(parts)) == ""
    for name in ("video", "audio"):
        assert not parts[name].media.audio_in_video
        # question, truth and hint as they were
        assert parts[name].model_copy(update={"media": whole.media}) == whole


def test_pictures_are_sight_too() -> None:
    parts = parts_of(prompt("image", "audio", "video"), unimodal=True)
    assert kinds(parts)["video"] == ["image", "video"]


@pytest.mark.parametrize("given", [(), ("video",), ("audio", "audio"), ("video", "image")])
def test_a_prompt_without_one_of_them_is_asked_once(given: tuple[Modality, ...]) -> None:
    assert list(parts_of(prompt(*given), unimodal=True)) == [""]


def test_nobody_asks_for_parts_without_the_reward() -> None:
    assert list(parts_of(prompt("video", "audio"), unimodal=False)) == [""]


def finished(*lengths: int, texts: tuple[str, ...] = (), logprob: float = -1.0) -> Any:
    """A finished request with completions of these lengths, or of these texts with a token for each
    letter."""
    texts = texts or ("",) * len(lengths)
    completions = [
        SimpleNamespace(
            token_ids=np.arange(length, dtype=np.int32),
            logprobs=np.full(length, logprob, dtype=np.float32),
            finish_reason="stop",
            versions=((2, length),),
            text=text,
            experts=None,
        )
        for length, text in zip(lengths or [len(text) for text in texts], texts, strict=True)
    ]
    return SimpleNamespace(prompt_token_ids=[1, 2, 3], completions=completions)


def test_a_group_is_done_with_all_its_parts_and_goes_to_the_scorer_as_one() -> None:
    request = RolloutRequest(seq=7, prompt_id="p", step=1, n=2)
    lease = RequestLease(request=request, attempt=1, consumer="a", hinted=False)
    rendered: Any = {"prompt_token_ids": [1, 2, 3]}
    parts = {"": rendered, "video": rendered, "audio": rendered}
    group = PendingGroup(lease, prompt("video", "audio"), parts)
    assert group.sequences == 6
    assert [read_request_id(name) for name in group.request_ids] == [
        (request.key, part) for part in group.prepared
    ]
    group.finished["audio"] = finished(texts=("cc", "c"))
    group.finished[""] = finished(texts=("aaa", "aaaa"))
    assert not group.done
    group.finished["video"] = finished(texts=("b", "bb"))
    assert group.done and group.tokens == 3 + 4 + 3 + 3 and group.whole is group.finished[""]
    assert group.unscored().opened_tag is None
    group.opened_tag = "<think>"
    unscored = group.unscored()
    assert unscored.prompt_id == "p" and unscored.opened_tag == "<think>"
    assert unscored.completions == [
        Completion(text="aaa", finished=True, mean_logprob=-1.0, tokens=3),
        Completion(text="aaaa", finished=True, mean_logprob=-1.0, tokens=4),
    ]
    assert [one.text for one in unscored.video_only or []] == ["b", "bb"]
    assert [one.text for one in unscored.audio_only or []] == ["cc", "c"]
    plain = PendingGroup(lease, prompt("video"), {"": rendered}, {"": finished(texts=("a", "b"))})
    assert plain.sequences == 2 and plain.done
    assert plain.unscored().video_only is None and plain.unscored().audio_only is None


def test_a_group_whose_log_probabilities_are_not_numbers_does_not_reach_the_scorer() -> None:
    broken = {"": finished(2, logprob=float("nan"))}
    with pytest.raises(DataError, match="mean_logprob nan over 2 tokens"):
        PendingGroup(LEASE, prompt(), {"": None}, broken).unscored()  # type: ignore[dict-item]


def group_of(lengths: list[int], scores: list[CompletionScore]) -> Any:
    return make_group(finished(*lengths), LEASE, scores, temperature=1.0)


def test_masked_and_empty_completions_are_left_out() -> None:
    group = group_of([2, 0, 4, 1], [MASKED, SCORED, SCORED, SCORED])
    assert group.trajectories[0].details == {"judge/visual_id_score": 0.25}
    assert [len(t.token_ids) for t in group.trajectories] == [4, 1]
    assert [t.id for t in group.trajectories] == ["00000003.0", "00000003.1"]
    check_group(group)


@pytest.mark.parametrize(
    ("lengths", "scores", "reason"),
    [
        ([2, 3], [MASKED, MASKED], "unscored"),
        ([0, 0], [SCORED, SCORED], "empty"),
        ([0, 2], [SCORED, MASKED], "unscored"),
    ],
)
def test_a_group_without_a_usable_completion_says_why(
    lengths: list[int], scores: list[CompletionScore], reason: str
) -> None:
    with pytest.raises(UnusableGroupError, match="group 00000003 of prompt 'p'") as caught:
        group_of(lengths, scores)
    assert caught.value.reason == reason


def test_an_empty_completion_has_no_log_probability_and_can_be_scored() -> None:
    assert completions_of(finished(0, 2)) == [
        Completion(text="", finished=True, mean_logprob=0.0, tokens=0),
        Completion(text="", finished=True, mean_logprob=-1.0, tokens=2),
    ]


def test_the_accuracy_of_an_evaluation_is_the_mean_of_what_was_scored() -> None:
    one = CompletionScore(reward=1.0, components={"accuracy": 1.0})
    payload = evaluation_payload(prompt(), finished(2, 3, 4), [one, MASKED, SCORED])
    assert (payload["accuracy"], payload["components"]) == (0.75, {"accuracy": 1.0})
    assert (payload["prompt_id"], payload["version"], payload["tokens"]) == ("p", 2, 9)
    assert evaluation_payload(prompt(), finished(1), [MASKED])["accuracy"] is None


def test_an_evaluation_that_is_marked_elsewhere_says_what_was_said_alone() -> None:
    scored = evaluation_payload(prompt(), finished(2), [SCORED])
    payload = evaluation_payload(prompt(), finished(2), [])
    assert payload == scored | {"accuracy": None, "components": {}, "details": {}}
