"""CG-AV-Counting ("AV-Counting"): how often something is seen and heard in a long video; 1,027
questions. The black-box half: a number for the whole video."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_number, video
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy, count_errors
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question


def read(folder: SetFolder) -> Iterator[Question]:
    """The authors' JSON or parquet; videos in cg_videos_720p/ or videos/."""
    for row in folder.rows("cg-av-counting.json", "*.json", "data/*.parquet", "*.parquet"):
        text, name = row.text("question"), row.text("video")
        path = folder.find(f"cg_videos_720p/{name}", f"videos/{name}", name)
        yield Question(
            id=row.text("index"),
            text=text,
            answer=gold_number(row, "answer"),
            kind="count",
            media=(video(path),),
            official=f"Please answer the question '{text}' with a number. Output only the number "
            "and nothing else.",
            parts={"category": row.text("category"), "type": row.text("type")},
        )


SET = BenchmarkSet(
    name="av_counting",
    title="CG-AV-Counting",
    paper="https://arxiv.org/abs/2506.05328",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/cgav_counting",
    senses=("video", "audio"),
    read=read,
    means=accuracy,
    others=count_errors,
    deviation="the white-box half (where each clue is: WCS, IFA) is not asked",
    listens=True,
)
