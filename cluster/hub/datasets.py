"""The public datasets of both papers: which files of which repository, and how their rows are read.

A layout is from the dataset's own card where ``source`` says so, else from readers that others
published (docs/papers.md, Data layouts)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from avatar_rl.common.errors import ConfigError
from avatar_rl.prompts.readers.rows import Values
from avatar_rl.prompts.record import ProblemType
from avatar_rl.rewards.answers.numeric import parse_number

_LETTER = re.compile(r"\s*(?:<answer>)?\s*\(?([A-H])\b[).:]?", re.IGNORECASE)
_LISTED = re.compile(r"(?m)^\s*\(?[A-H][.):]\s*\S")


@dataclass(frozen=True)
class RowFile:
    """Files of rows, and what becomes of them."""

    pattern: str  # of paths below the dataset's folder
    out: str  # rows that are written; {stem} is the file's own name
    media: tuple[str, ...] = ("",)  # folders that the rows' media may be relative to


@dataclass(frozen=True)
class PublicDataset:
    """One dataset of a hub."""

    name: str
    repo: str  # OWNER/NAME
    what: str
    source: str  # of the layout
    rows: tuple[RowFile, ...]
    adapt: Callable[[Values], Values] = dict
    note: str = ""


def _intent(row: Values) -> Values:
    """HumanOmniV2's own problem types: several letters may be right, or yes or no."""
    kinds = {"emer_ov_mc": "multi_label", "judge": "free_form"}
    kind = str(row.get("problem_type"))
    return row | {"problem_type": kinds.get(kind, kind)}


def _avqa(row: Values) -> Values:
    """EchoInk's rows: ``path`` is an object of a picture and a sound."""
    path = row.get("path")
    if not isinstance(path, dict):
        return row
    kept = {key: value for key, value in row.items() if key not in ("path", "data_type")}
    return kept | {key: value for key, value in path.items() if value is not None}


def _by_answer(row: Values) -> Values:
    """A type for rows that name none: a letter where options are listed, a number, words."""
    answer = str(row.get("solution") or row.get("answer") or "")
    question = f"{row.get('problem')!r}\n{row.get('messages')!r}".replace("\\n", "\n")
    if row.get("options") or (_LETTER.match(answer) and len(_LISTED.findall(question)) > 1):
        kind = ProblemType.MULTIPLE_CHOICE
    elif parse_number(answer) is not None:
        kind = ProblemType.NUMERICAL
    else:
        kind = ProblemType.FREE_FORM
    return row | {"problem_type": row.get("problem_type") or kind.value}


_CARD = "the dataset's card"
DATASETS: dict[str, PublicDataset] = {
    one.name: one
    for one in (
        PublicDataset(
            "avatar_rl",
            "yogkul2000/AVATAR-RL-dataset",
            "AVATAR, all stages",
            "the authors' code",
            (RowFile("**/*.jsonl", "{stem}.rows.jsonl"), RowFile("**/*.json", "{stem}.rows.jsonl")),
            adapt=_by_answer,
            note="its file names were not at hand: every file of rows is read",
        ),
        PublicDataset(
            "intent_train",
            "PhilipC/IntentTrain",
            "AVATAR, Stages 1 and 2 (HumanOmniV2)",
            "a reader that others published",
            (RowFile("*_rewrite.json", "{stem}.rows.jsonl", ("", "videos")),),
            adapt=_intent,
        ),
        PublicDataset(
            "avqa_r1_6k",
            "harryhsing/AVQA-R1-6K",
            "AVATAR, Stage 2: AVQA with a picture for each clip (EchoInk)",
            "its authors' code",
            (
                RowFile("AVQA_R1/train/*_train.json", "train.rows.jsonl", ("AVQA_R1/train",)),
                RowFile("AVQA_R1/valid/*_valid.json", "heldout.rows.jsonl", ("AVQA_R1/valid",)),
            ),
            adapt=_avqa,
            note="AVQA itself is at its authors' site only, not on a hub",
        ),
        PublicDataset(
            "vision_r1_rl",
            "Osilly/Vision-R1-rl",
            "AVATAR, maths",
            "a reader that others published; file names from its page",
            (
                RowFile("train.parquet", "train.rows.jsonl"),
                RowFile("test.parquet", "heldout.rows.jsonl"),
            ),
            adapt=_by_answer,
        ),
        PublicDataset(
            "omnivideo_r1",
            "jankin123/OmniVideo-R1",
            "OmniVideo-R1, QI and MA",
            _CARD,
            (
                RowFile("merged_train_all_qi.jsonl", "qi.rows.jsonl"),
                RowFile("merged_train_fusion_ma.jsonl", "ma.rows.jsonl"),
            ),
            adapt=_by_answer,
            note="a list only: its videos are LLaVA-Video's and Video-Vista's, its sounds are "
            "their tracks",
        ),
    )
}


def dataset(name: str) -> PublicDataset:
    """The dataset ``name``; "OWNER/NAME" is any repository, whose rows are left as they are.

    Raises ConfigError that lists what there is."""
    if "/" in name:
        return PublicDataset(name, name, "", "", ())
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), DATASETS, n=1)
        remedy = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise ConfigError(
            f"no public dataset {name!r}: {remedy} {', '.join(DATASETS)}, and OWNER/NAME of any"
        )
    return DATASETS[name]
