"""Reasoning of three lengths over the synthetic world: a plan, notes on every part of the clip, a
conclusion. Honest, or wrong in one of the three."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np

from avatar_rl.common.types import JsonObject
from avatar_rl.prompts.synthetic.scene import NONE

#: How often the notes go through the clip, by name of the length.
PASSES: dict[str, tuple[str, ...]] = {
    "short": (),
    "medium": ("parts", "things"),
    "long": ("parts", "things", "back", "parts", "things", "back", "parts"),
}


class Fault(StrEnum):
    """Which third of a reasoning is wrong. Each costs the answer."""

    NONE = "none"
    PLAN = "plan"  # one sense is not used, and the answer is a guess
    EVIDENCE = "evidence"  # notes and answer are those of another clip
    CONCLUSION = "conclusion"  # right notes, and the answer is a guess


def taught(rows: Sequence[JsonObject], length: str, honest: float, seed: int) -> list[JsonObject]:
    """The cold start's rows with reasoning of ``length``: a share ``honest`` of it right, the rest
    wrong in its plan, its notes or its conclusion equally often."""
    rng = np.random.default_rng([seed, list(PASSES).index(length)])
    by_type: dict[str, list[JsonObject]] = defaultdict(list)
    for row in rows:
        by_type[str(row["category"])].append(row)
    faulty = (Fault.PLAN, Fault.EVIDENCE, Fault.CONCLUSION)
    made = []
    for row in rows:
        fault = Fault.NONE if rng.random() < honest else faulty[rng.integers(len(faulty))]
        others = by_type[str(row["category"])]
        made.append(with_reasoning(row, others[rng.integers(len(others))], length, fault))
    return made


def with_reasoning(
    row: JsonObject, other: JsonObject, length: str, fault: Fault = Fault.NONE
) -> JsonObject:
    """A row of sft.jsonl with reasoning of ``length``. ``other``: one of the same question type,
    whose answer stands for a guess."""
    source = other if fault is Fault.EVIDENCE else row
    scene = json.loads(source["extra"]["scene"])
    readout, _, conclusion = str(source["reasoning"]).rpartition("so ")
    answer = str(source["answer"])
    plan = f"plan : {row['question']}"
    if fault is Fault.PLAN:
        plan, scene, readout = f"{plan} look only", _silent(scene), ""
    if fault in (Fault.PLAN, Fault.CONCLUSION):
        answer = str(other["answer"])
        conclusion = f"maybe {answer}"
    notes = [note for kind in PASSES[length] for note in _PASSES[kind](scene)]
    said = [plan, *notes, *([readout.strip()] if readout.strip() else []), f"so {conclusion}"]
    return row | {"reasoning": " . ".join(said), "answer": answer}


def _silent(scene: Mapping[str, Any]) -> dict[str, Any]:
    return {**scene, "sounds": [NONE] * len(scene["sounds"])}


def _seen(scene: Mapping[str, Any], slot: int) -> str:
    return " ".join(
        f"{sprite['colours'][slot]} {sprite['form']} {sprite['places'][slot]}"
        for sprite in scene["sprites"]
    )


def _heard(scene: Mapping[str, Any], slot: int) -> str:
    sound = scene["sounds"][slot]
    return NONE if sound == NONE else f"{sound} beep"


def _parts(scene: Mapping[str, Any]) -> list[str]:
    slots = range(len(scene["sounds"]))
    return [f"{slot + 1} : {_seen(scene, slot)} {_heard(scene, slot)}" for slot in slots]


def _back(scene: Mapping[str, Any]) -> list[str]:
    slots = reversed(range(len(scene["sounds"])))
    return [f"{slot + 1} : {_heard(scene, slot)} {_seen(scene, slot)}" for slot in slots]


def _things(scene: Mapping[str, Any]) -> list[str]:
    things = [f"{sprite['form']} : {' '.join(sprite['places'])}" for sprite in scene["sprites"]]
    return [*things, f"beeps : {' '.join(scene['sounds'])}"]


_PASSES = {"parts": _parts, "things": _things, "back": _back}
