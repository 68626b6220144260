"""r_cons and r_comp (docs/method.md 2.1) on values worked out by hand, and what a judge is
shown."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.record import MediaItem, MediaPlan, ProblemType, Prompt
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.world import synthesize
from avatar_rl.rewards.answers.grounding import Segment
from avatar_rl.rewards.config import RewardConfig
from avatar_rl.rewards.judges.attachments import MediaAttach, cut
from avatar_rl.rewards.judges.base import ContentPart, Verdict
from avatar_rl.rewards.judges.rule_segments import completeness, consistency
from avatar_rl.rewards.judges.segment_prompts import COMPLETENESS, CONSISTENCY
from avatar_rl.rewards.judges.segments import SegmentCompleteness, SegmentConsistency
from avatar_rl.rewards.record import Completion, ScoreRequest
from avatar_rl.rewards.suite import RewardSuite
from tests.unit.media_files import tone, write_video, write_wav
from tests.unit.test_rewards_judge_server import Reply, judge_server

# Four slots of 0.5 s: a red disc stays left, then goes right; beeps in slots 1 (low) and 3 (high).
SCENE = {
    "slot_seconds": 0.5,
    "sprites": [
        {
            "form": "disc",
            "colours": ["red"] * 4,
            "places": ["left", "left", "right", "right"],
            "lit": [0] * 4,
        }
    ],
    "sounds": ["none", "low", "none", "high"],
}
PROMPT = Prompt(
    id="p",
    question="Which beep comes last?",
    answer="high",
    problem_type=ProblemType.FREE_FORM,
    extra={"scene": json.dumps(SCENE)},
)
TAIL = "<thinking>so</thinking><answer>high</answer>"


def request(*texts: str) -> ScoreRequest:
    completions = [
        Completion(text=text, finished=True, mean_logprob=-1.0, tokens=5) for text in texts
    ]
    return ScoreRequest(prompt=PROMPT, completions=completions)


def seg(span: str, caption: str) -> str:
    return f"<time>{span}</time><caption>{caption}</caption>"


def test_a_caption_by_hand() -> None:
    # slot 3 is red, disc, right, high, beep. Said: red, square, left, high.
    verdict = consistency(PROMPT, Segment(1.5, 2.0, "A red square on the left, a high tone"))
    # of {red, square} one is true; of {left} none; of all four two; of {high} all
    assert [verdict[name] for name in CONSISTENCY] == [0.5, 0.0, 0.5, 1.0]
    assert set(consistency(PROMPT, Segment(5.0, 6.0, "red disc")).values()) == {
        0.0
    }  # outside the scene
    assert set(consistency(PROMPT, Segment(0.0, 1.0, "lovely weather")).values()) == {
        0.0
    }  # says nothing checkable
    assert set(consistency(PROMPT, Segment(0.0, 1.0, "a red disc, left")).values()) == {1.0}


def test_a_choice_of_segments_by_hand() -> None:
    # the answer "high" is heard in slot 3 only
    exact = completeness(PROMPT, [Segment(1.5, 2.0, "x")])
    assert [exact[name] for name in COMPLETENESS] == [1.0, 1.0, 1.0]
    wide = completeness(PROMPT, [Segment(0.0, 2.0, "x")])
    assert [wide[name] for name in COMPLETENESS] == [1.0, 0.25, 1.0]
    wrong = completeness(PROMPT, [Segment(0.0, 1.0, "x")])
    assert [wrong[name] for name in COMPLETENESS] == [0.0, 0.0, 0.0]
    # a question whose answer is in no slot ("2") needs them all: two of four covered, both needed
    count = PROMPT.model_copy(update={"answer": "2"})
    assert list(completeness(count, [Segment(0.0, 1.0, "x")]).values()) == [1.0, 1.0, 0.5]


def test_rewards_of_whole_completions_add_up_as_published() -> None:
    weights = {
        "grounding_format": 1.0,
        "accuracy": 1.0,
        "segment_consistency": 0.5,
        "segment_completeness": 0.5,
    }
    suite = RewardSuite(
        RewardConfig.model_validate({"weights": weights, "judge": {"kind": "rule"}})
    )
    perfect = seg("1.5-2.0", "a red disc, right, high beep") + TAIL
    # r_cons: segment 1 is right (1), segment 2 ends before it starts (0); r_comp: slot 0 is not
    # needed
    half = seg("0.0-0.5", "red disc") + seg("2.0-1.5", "red disc") + TAIL
    bare = TAIL
    scored = suite.score(request(perfect, half, bare))
    assert scored[0].reward == 3.0  # 1 + 1 + 0.5 * (1 + 1)
    assert scored[1].components == {
        "grounding_format": 0.0,
        "accuracy": 1.0,
        "segment_consistency": 0.5,
        "segment_completeness": 0.0,
    }
    assert scored[1].reward == 1.25
    assert scored[2].reward == 1.0  # the answer alone
    suite.close()


class Stub:
    """A judge that gives what it is told to."""

    def __init__(self, scores: list[float | None]) -> None:
        self.scores, self.shown = scores, list[int]()

    async def consistency(
        self, prompt: Prompt, segment: Segment, media: Sequence[ContentPart]
    ) -> Verdict | None:
        self.shown.append(len(media))
        score = self.scores.pop(0)
        return None if score is None else dict.fromkeys(CONSISTENCY, score)

    async def completeness(
        self, prompt: Prompt, segments: Sequence[Segment], media: Sequence[ContentPart]
    ) -> Verdict | None:
        self.shown.append(len(media))
        score = self.scores.pop(0)
        return None if score is None else dict.fromkeys(COMPLETENESS, score)


TWO = seg("0.0-1.0", "a") + seg("1.0-2.0", "b") + TAIL


def test_a_judge_that_fails_on_one_segment_masks_the_mean() -> None:
    known = SegmentConsistency(Stub([0.25, 0.75]), None)  # type: ignore[arg-type]
    assert asyncio.run(known.score(request(TWO)))[0].value == 0.5
    failing = SegmentConsistency(Stub([0.25, None]), None)  # type: ignore[arg-type]
    assert asyncio.run(failing.score(request(TWO)))[0].value is None
    masked = SegmentCompleteness(Stub([None]), None)  # type: ignore[arg-type]
    assert asyncio.run(masked.score(request(TWO)))[0].value is None


def test_a_segment_that_cannot_be_cut_counts_zero_and_the_others_are_shown() -> None:
    def attach(prompt: Prompt) -> list[ContentPart]:
        if prompt.media.items[0].clip == (1.0, 2.0):
            raise DataError("outside")
        return [{"type": "text", "text": "x"}] * 3

    item = MediaItem(kind="video", uri="a.mp4", clip=(0.0, 9.0))
    prompt = PROMPT.model_copy(update={"media": MediaPlan(items=(item,))})
    asked = ScoreRequest(prompt=prompt, completions=request(TWO).completions)
    judge = Stub([1.0])
    reward = SegmentConsistency(judge, attach)  # type: ignore[arg-type]
    assert asyncio.run(reward.score(asked))[0].value == 0.5
    assert judge.shown == [3] and reward.counts["uncuttable"] == 1
    judge = Stub([0.8])
    assert asyncio.run(SegmentCompleteness(judge, attach).score(asked))[0].value == pytest.approx(
        0.8
    )  # type: ignore[arg-type]
    assert judge.shown == [3]


def test_segments_are_windows_of_the_prompts_own_clip() -> None:
    items = (MediaItem(kind="video", uri="a", clip=(2.0, 5.0)), MediaItem(kind="image", uri="b"))
    prompt = PROMPT.model_copy(update={"media": MediaPlan(items=items)})
    video, image = cut(prompt, Segment(1.0, 4.0, "x")).prompt.media.items
    assert video.clip == (3.0, 5.0) and image.clip is None
    whole = PROMPT.model_copy(
        update={"media": MediaPlan(items=(MediaItem(kind="audio", uri="a"),))}
    )
    assert cut(whole, Segment(1.0, 4.0, "x")).prompt.media.items[0].clip == (1.0, 4.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Prompt:
    """A real prompt with its video and sound."""
    from avatar_rl.prompts.config import DataConfig
    from avatar_rl.prompts.datasets import PromptIndex

    out = tmp_path_factory.mktemp("world") / "w"
    synthesize(out, WorldConfig(n_train=1, n_heldout=0, n_sft=0))
    return next(iter(PromptIndex.read([out / "train.jsonl"], DataConfig())))


def test_frames_and_sound_are_sent_as_a_judge_reads_them(clip: Prompt) -> None:
    parts = MediaAttach(MediaConfig(), ("video", "audio"), frames=3)(clip)
    assert [part["type"] for part in parts] == ["image_url"] * 3 + ["input_audio"]
    head, _, data = parts[0]["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (84, 28)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(parts[3]["input_audio"]["data"])))
    assert (
        rate == 16_000
        and len(samples) == pytest.approx(1.28 * 16_000, abs=2)
        and np.abs(samples).max() > 0.01
    )
    assert [part["type"] for part in MediaAttach(MediaConfig(), ("audio",), frames=3)(clip)] == [
        "input_audio"
    ]
    short = MediaAttach(MediaConfig(), ("audio",), frames=3)(
        cut(clip, Segment(0.0, 0.32, "x")).prompt
    )
    samples, _ = soundfile.read(io.BytesIO(base64.b64decode(short[0]["input_audio"]["data"])))
    assert len(samples) == pytest.approx(0.32 * 16_000, abs=2)
    with pytest.raises(DataError):
        MediaAttach(MediaConfig(), ("audio",), frames=3)(cut(clip, Segment(50.0, 60.0, "x")).prompt)


@pytest.mark.parametrize("separate", [False, True])
def test_a_segment_behind_the_end_of_the_sound_is_judged_by_its_frames(
    tmp_path: Path, separate: bool
) -> None:
    sound = tone(440, 1, 48_000)
    write_video(tmp_path / "clip.mp4", [(200, 30, 10)] * 24, sound=sound)  # 3 s to see, 1 s to hear
    track = write_wav(tmp_path / "sound.wav", sound, 48_000) if separate else tmp_path / "clip.mp4"
    seen = MediaItem(kind="video", uri=str(tmp_path / "clip.mp4"))
    media = MediaPlan(items=(MediaItem(kind="audio", uri=str(track)), seen))
    prompt = PROMPT.model_copy(update={"media": media})
    attach = MediaAttach(MediaConfig(), ("video", "audio"), frames=2)

    def kinds(start: float, end: float) -> list[str]:
        return [part["type"] for part in attach(cut(prompt, Segment(start, end, "x")).prompt)]

    assert kinds(0.0, 1.0) == ["input_audio", "image_url", "image_url"]
    assert kinds(2.0, 3.0) == ["image_url", "image_url"]
    judge = Stub([0.5])
    asked = ScoreRequest(
        prompt=prompt, completions=request(seg("2.0-3.0", "a red disc") + TAIL).completions
    )
    reward = SegmentConsistency(judge, attach)  # type: ignore[arg-type]
    assert asyncio.run(reward.score(asked))[0].value == 0.5 and judge.shown == [2]
    with pytest.raises(DataError):  # nothing to see either
        kinds(7.0, 9.0)
    with pytest.raises(DataError):  # a judge that only hears
        MediaAttach(MediaConfig(), ("audio",), frames=2)(cut(prompt, Segment(2.0, 3.0, "x")).prompt)
    deaf = prompt.model_copy(
        update={"media": MediaPlan(items=(MediaItem(kind="audio", uri="absent.wav"), seen))}
    )
    with pytest.raises(
        DataError, match="no such file"
    ):  # a fault of the data is none of the segment's
        attach(deaf)


def test_an_endpoint_sees_the_clip_of_each_segment(clip: Prompt) -> None:
    reply = json.dumps(dict.fromkeys(CONSISTENCY, 0.5))
    with judge_server(lambda n: Reply(content=reply)) as server:
        judge = {
            "base_url": server.url,
            "model": "judge",
            "attach": ["video", "audio"],
            "attach_frames": 2,
        }
        config = RewardConfig.model_validate(
            {"weights": {"segment_consistency": 1.0}, "judge": judge}
        )
        suite = RewardSuite(
            config,
            MediaAttach(MediaConfig(), config.judge.attach, frames=config.judge.attach_frames),
        )
        text = seg("0.0-0.6", "first") + seg("0.6-1.2", "second") + seg("70.0-80.0", "never") + TAIL
        [scored] = suite.score(
            ScoreRequest(
                prompt=clip,
                completions=[Completion(text=text, finished=True, mean_logprob=-1, tokens=9)],
            )
        )
        suite.close()
    assert scored.reward == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    kinds = [[part["type"] for part in one["messages"][1]["content"]] for one in server.requests]
    assert kinds == [["image_url", "image_url", "input_audio", "text"]] * 2
    captions = {
        json.loads(one["messages"][1]["content"][-1]["text"])["caption"] for one in server.requests
    }
    assert captions == {"first", "second"}


def test_segments_need_a_judge_that_sees() -> None:
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    config = RewardConfig.model_validate({"weights": {"segment_completeness": 1.0}, "judge": judge})
    with pytest.raises(ConfigError, match=r"set rewards.judge.attach: \[video\]"):
        RewardSuite(config)


def test_media_without_a_sense_keep_their_shape(clip: Prompt) -> None:
    from avatar_rl.prompts.media.loader import MediaLoader

    both = MediaLoader(MediaConfig(), Path(".")).load_plan(clip.media)
    deaf = MediaLoader(MediaConfig(blank=("audio",)), Path(".")).load_plan(clip.media)
    assert np.array_equal(deaf.videos[0].frames, both.videos[0].frames)
    assert (
        deaf.audios[0].samples.shape == both.audios[0].samples.shape
        and not deaf.audios[0].samples.any()
    )
    assert both.audios[0].samples.any()
