"""Daily-Omni: everyday clips of 30 and 60 seconds with sound, four options; 1,197 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question


def read(folder: SetFolder) -> Iterator[Question]:
    """qa.json beside Videos/<id>/<id>_video.mp4."""
    for number, row in enumerate(folder.rows("qa.json", "QA_all.json")):
        options = options_of(row, "Choice")
        text, clip = row.text("Question"), row.text("video_id")
        path = folder.find(f"Videos/{clip}/{clip}_video.mp4", f"videos/{clip}/{clip}_video.mp4")
        yield Question(
            id=f"{clip}-{number}",
            text=text,
            answer=gold_letter(row, options, "Answer"),
            kind="choice",
            options=options,
            media=(video(path),),
            official=joined(
                "Your task is to accurately answer multiple-choice questions based on the given "
                "video.",
                "Select the single most accurate answer from the given choices.",
                f"Question: {text}",
                f"Choices: {list(options)}",
                "Your answer should be a capital letter representing your choice: A, B, C, or D. "
                "Don't generate any other text.",
            ),
            parts={
                "task": row.text("Type"),
                "duration": row.text("video_duration"),
                "category": row.text("video_category"),
            },
        )


SET = BenchmarkSet(
    name="dailyomni",
    title="Daily-Omni",
    paper="https://arxiv.org/abs/2505.17862",
    layout="https://github.com/Lliar-liar/Daily-Omni",
    senses=("video", "audio"),
    read=read,
    means=accuracy,
    listens=True,
)
