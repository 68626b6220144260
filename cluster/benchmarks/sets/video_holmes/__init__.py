"""Video-Holmes: clues in suspense films, six options; 1,837 questions of seven types."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question

_ASK = (
    "Select the best answer to the following multiple-choice question based on the video. Respond "
    "with only the letter (A, B, C, D, E, or F) of the correct option."
)


def read(folder: SetFolder) -> Iterator[Question]:
    """test_Video-Holmes.json; videos in videos_cropped/<video ID>.mp4."""
    for number, row in enumerate(folder.rows("test_Video-Holmes.json")):
        options = options_of(row, "Options")
        text, clip = row.text("Question"), row.text("video ID")
        stem = f"videos_cropped/{clip}"
        path = folder.find(*(f"{stem}.{end}" for end in ("mp4", "MP4", "mkv", "webm")))
        yield Question(
            id=str(row.get("Question ID") or f"{clip}-{number}"),
            text=text,
            answer=gold_letter(row, options, "Answer"),
            kind="choice",
            options=options,
            media=(video(path),),
            official=joined(f"Question: {text}", *options, _ASK),
            parts={"type": row.text("Question Type")},
        )


SET = BenchmarkSet(
    name="video_holmes",
    title="Video-Holmes",
    paper="https://arxiv.org/abs/2505.21374",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/video_holmes",
    senses=("video",),
    read=read,
    means=accuracy,
    deviation="no answer is wrong; the published task draws a letter at random",
    listens=True,
)
