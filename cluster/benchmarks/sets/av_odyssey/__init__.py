"""AV-Odyssey: pictures, videos and sounds inside the question, four options; 4,555 questions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import (
    LETTER_ONLY,
    audio,
    gold_letter,
    image,
    joined,
    options_of,
    video,
)
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.common.errors import InputError
from avatar_rl.prompts.record import MediaItem

_TAG = re.compile(r"\[(audio|video|img)(\d+)\]")
_MAKE = {"audio": audio, "video": video, "img": image}
_WORD = {"audio": "<audio>", "video": "<video>", "img": "<image>"}
_COLUMN = {"audio": "audio_path", "video": "video_path", "img": "image_path"}


def read(folder: SetFolder) -> Iterator[Question]:
    """Parquet rows; [audio1], [img1] and [video1] in question and options are places of media."""
    for row in folder.rows("data/*.parquet", "*.parquet", "*.jsonl", "*.json"):
        media: list[MediaItem] = []
        text = _placed(folder, row, row.text("question"), media)
        options = tuple(_placed(folder, row, one, media) for one in options_of(row, "options"))
        yield Question(
            id=row.text("question_id"),
            text=text,
            answer=gold_letter(row, options, "answer"),
            kind="choice",
            options=options,
            media=tuple(media),
            in_text=True,
            official=joined(text, *options, LETTER_ONLY),
            parts={"subfield": row.text("subfield")},
        )


def _placed(folder: SetFolder, row: SetRow, text: str, media: list[MediaItem]) -> str:
    """``text`` with our tags; its media are appended in the order of their places."""

    def tag(match: re.Match[str]) -> str:
        kind, number = match[1], int(match[2])
        paths = row.texts(_COLUMN[kind])
        if not 1 <= number <= len(paths):
            raise InputError(
                row.where,
                f"{match[0]} has no file: {_COLUMN[kind]} holds {len(paths)}",
                "correct the row",
            )
        media.append(_MAKE[kind](folder.find(paths[number - 1])))
        return _WORD[kind]

    return _TAG.sub(tag, text)


SET = BenchmarkSet(
    name="av_odyssey",
    title="AV-Odyssey Bench",
    paper="https://arxiv.org/abs/2412.02611",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/av_odyssey",
    senses=("audio",),
    read=read,
    means=accuracy,
    deviation="no answer is wrong; the published task counts it as A",
)
