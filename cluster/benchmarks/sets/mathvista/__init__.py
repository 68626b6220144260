"""MathVista testmini: charts, figures and photos with a number, a list or a choice; 1,000
questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, image
from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.prompts.choices import lettered


def read(folder: SetFolder) -> Iterator[Question]:
    """testmini rows; ``precision`` says to how many decimals a number is compared."""
    for row in folder.rows("data/testmini*.parquet", "testmini*.parquet", "testmini*.json"):
        several = row.text("question_type") == "multi_choice"
        options = lettered(row.texts("choices")) if several else ()
        kind = row.text("answer_type")
        precision = row.get("precision")
        decimals = {"integer": 0, "float": int(float(str(precision or 0)))}.get(kind)
        about = row.get("metadata")
        about = about if isinstance(about, dict) else {}
        skills = about.get("skills")
        yield Question(
            id=row.text("pid"),
            text=row.text("question"),
            answer=gold_letter(row, options, "answer") if several else row.text("answer"),
            kind="choice" if several else "text" if kind == "list" else "number",
            options=options,
            media=(image(folder.embedded(row.need("decoded_image", "image"), row.where)),),
            official=row.text("query"),
            parts={
                "task": str(about.get("task")),
                "context": str(about.get("context")),
                "skills": tuple(map(str, skills)) if isinstance(skills, list) else (),
            },
            decimals=None if several else decimals,
        )


SET = BenchmarkSet(
    name="mathvista",
    title="MathVista",
    paper="https://arxiv.org/abs/2310.02255",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/mathvista",
    senses=("image",),
    read=read,
    means=accuracy,
    deviation="the answer is taken out by rule, where the authors ask a language model; it is "
    "compared as they do",
)
