"""MMVU: expert knowledge from videos of 27 subjects; the 1,000 questions of its validation set."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, options_of, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows with ``video_path`` (.../<subject>/<file>), ``choices`` by letter, or none."""
    for row in folder.rows("validation.json", "data/*.parquet", "*.parquet", "*.jsonl"):
        several = row.text("question_type") == "multiple-choice"
        options = options_of(row, "choices") if several else ()
        text, path = row.text("question"), row.text("video_path", "video")
        path = path.rpartition("resolve/main/")[2]
        ask = (
            "Do not generate any intermediate reasoning process. Answer directly with the option "
            "letter from the given choices."
            if several
            else "Do not generate any intermediate reasoning process. Directly output the final "
            "answer."
        )
        yield Question(
            id=row.text("id"),
            text=text,
            answer=gold_letter(row, options, "answer") if several else row.text("answer"),
            kind="choice" if several else "number",
            options=options,
            media=(video(folder.find(path)),),
            official=joined(
                f"Question:{text}",
                *(f"{one[0]}:{one[2:]}" for one in options),
                "Visual Information: processed video",
                ask,
            ),
            parts={"subject": path.split("/")[-2], "kind": row.text("question_type")},
        )


SET = BenchmarkSet(
    name="mmvu",
    title="MMVU",
    paper="https://arxiv.org/abs/2501.12380",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/mmvu",
    senses=("video",),
    read=read,
    means=accuracy,
    deviation="open answers are compared as numbers or words; the authors ask a language model",
)
