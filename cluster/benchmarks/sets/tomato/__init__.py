"""TOMATO: temporal reasoning over frames; 1,484 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, joined, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.prompts.choices import split_option

_ASK = (
    "You will be provided with frames uniformly sampled from a video, the frames are provided in "
    "chronological order of the video. Analyze these frames and provide the answer to the question "
    "about the video content. Answer the multiple-choice question about the video content.\n\n"
    "You must use these frames to answer the multiple-choice question; do not rely on any externel "
    "knowledge or commonsense."
)
_GUESS = (
    "Even if the information in these separate frames is not enough to answer the question, PLEASE "
    "TRY YOUR BEST TO GUESS AN ANSWER WHICH YOU THINK WOULD BE THE MOST POSSIBLE ONE BASED ON THE "
    "QUESTION.\n\nDO NOT GENERATE ANSWER SUCH AS 'NOT POSSIBLE TO DETERMINE.'"
)


def read(folder: SetFolder) -> Iterator[Question]:
    """Rows with ``video_path``; the answer is the number of the right option, from 0."""
    for row in folder.rows("data/*.parquet", "*.parquet", "*.jsonl", "*.json"):
        # Options are plain words here: a letter of their own would be part of the answer.
        texts = row.texts("options")
        options = tuple(f"{chr(ord('A') + place)}. {text}" for place, text in enumerate(texts))
        letters = {
            split_option(option)[0]: text for option, text in zip(options, texts, strict=True)
        }
        text = row.text("question")
        yield Question(
            id=row.text("id"),
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=(video(folder.find(row.text("video_path"))),),
            official=joined(
                _ASK,
                f"\n<question>\n{text}\n</question>\n\n<options>\n{letters}\n</options>\n",
                _GUESS,
            ),
            parts={
                "reason": row.text("reason_type"),
                "demonstration": row.text("demonstration_type"),
            },
        )


SET = BenchmarkSet(
    name="tomato",
    title="TOMATO",
    paper="https://arxiv.org/abs/2410.23266",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/tomato",
    senses=("video",),
    read=read,
    means=accuracy,
    deviation="no answer is wrong; the published task counts it as A",
)
