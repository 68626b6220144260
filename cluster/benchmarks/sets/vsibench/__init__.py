"""VSI-Bench: space and order from walks through rooms; 5,130 questions of eight tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from avatar_rl.cluster.benchmarks.ask import LETTER_ONLY, gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import by_part, equal, mean_of
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Marked, Question, Weighed
from avatar_rl.common.errors import InputError

CHOICES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
NUMBERS = (
    "object_abs_distance",
    "object_counting",
    "object_size_estimation",
    "room_size_estimation",
)
_DIRECTION = "object_rel_direction"


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows that name their video by ``dataset`` and ``scene_name``."""
    for row in folder.rows("test.jsonl", "*.jsonl", "test-*.parquet", "*.parquet"):
        task, text = row.text("question_type"), row.text("question")
        if task not in CHOICES + NUMBERS:
            raise InputError(row.where, f"unknown question_type {task!r}", "correct the row")
        options = options_of(row, "options") if task in CHOICES else ()
        scene = f"{row.text('dataset')}/{row.text('scene_name')}.mp4"
        ask = (
            ("Options:", *options, LETTER_ONLY)
            if options
            else ("Please answer the question using a single word or phrase.",)
        )
        yield Question(
            id=row.text("id"),
            text=text,
            answer=gold_letter(row, options, "ground_truth")
            if options
            else row.text("ground_truth"),
            kind="choice" if options else "relative",
            options=options,
            media=(video(folder.find(scene)),),
            official=joined("These are frames of a video.", text, *ask),
            parts={"task": task},
        )


def means(marked: Sequence[Marked]) -> dict[str, Weighed]:
    """The mean over the tasks; the three levels of relative direction are one task."""
    tasks = {name: equal(of_task) for name, of_task in by_part(marked, "task").items()}
    shown = {f"task/{name}": value for name, value in tasks.items()}
    levels = [value for name, value in tasks.items() if name.startswith(_DIRECTION)]
    if levels:
        tasks = {name: value for name, value in tasks.items() if not name.startswith(_DIRECTION)}
        tasks[_DIRECTION] = shown[f"task/{_DIRECTION}"] = mean_of(levels)
    return {"accuracy": mean_of(list(tasks.values()))} | shown


SET = BenchmarkSet(
    name="vsibench",
    title="VSI-Bench",
    paper="https://arxiv.org/abs/2412.14171",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/vsibench",
    senses=("video",),
    read=read,
    means=means,
)
