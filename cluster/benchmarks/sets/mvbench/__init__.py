"""MVBench: twenty tasks about what changes over time; 4,000 questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow, seconds
from avatar_rl.cluster.benchmarks.frames import frames_in, video_of
from avatar_rl.cluster.benchmarks.metrics import macro
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

#: Where the videos of a task lie below video/ (or data0613/).
FOLDERS = {
    "object_interaction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "action_prediction": "star/Charades_segment",
    "action_localization": "sta/sta_video_segment",
    "moving_count": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd_convert",
    "character_order": "perception/videos",
    "object_shuffle": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "moving_direction": "clevrer/video_validation",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "moving_attribute": "clevrer/video_validation",
    "action_antonym": "ssv2_video_mp4",
    "unexpected_action": "FunQA_test/test",
    "counterfactual_inference": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "action_count": "perception/videos",
}
#: The same in the first release, where it differs.
FIRST_RELEASE = {
    "object_interaction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_localization": "sta/sta_video",
    "fine_grained_pose": "nturgbd",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "action_antonym": "ssv2_video",
}
_ROOTS = ("video", "video/data0613", "data0613", ".")
#: Of the frames of tvqa/frames_fps3_hq/<clip>/00001.jpg where the row does not say.
_FRAMES_PER_S = 3


def read(folder: SetFolder) -> Iterator[Question]:
    """json/<task>.json, one file for each task."""
    for path in folder.files("json/*.json"):
        task = path.stem
        for number, row in enumerate(folder.rows(f"json/{path.name}")):
            options = options_of(row, "candidates")
            text = row.text("question")
            bracketed = [f"({one[0]}){one[2:]}" for one in options]
            yield Question(
                id=f"{task}-{number}",
                text=text,
                answer=gold_letter(row, options, "answer"),
                kind="choice",
                options=options,
                media=(video(_path(folder, task, row), clip=_clip(row)),),
                official=joined(
                    f"Question:{text}", "Option:", *bracketed, "Only give the best option."
                ),
                parts={"task": task},
            )


def _path(folder: SetFolder, task: str, row: SetRow) -> Path:
    """The video of a row; a clip that is published as a folder of frames becomes one."""
    name = row.text("video")
    below = dict.fromkeys((FOLDERS.get(task, task), FIRST_RELEASE.get(task, task)))
    paths = [f"{root}/{one}/{name}" for root in _ROOTS for one in below]
    for path in paths:
        if frames := frames_in(folder.root / path):
            rate = seconds(row.get("fps") or _FRAMES_PER_S, row.where)
            return video_of(frames, round(rate), folder.media_folder)
    return folder.find(*paths)


def _clip(row: SetRow) -> tuple[float, float] | None:
    start, end = row.get("start"), row.get("end")
    if start is None or end is None:
        return None
    return seconds(start, row.where), seconds(end, row.where)


SET = BenchmarkSet(
    name="mvbench",
    title="MVBench",
    paper="https://arxiv.org/abs/2311.17005",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/mvbench",
    senses=("video",),
    read=read,
    means=macro("task"),
)
