"""Raw fields of a row checked and brought into the one form of a Prompt."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TypeAlias

from pydantic import ValidationError

from avatar_rl.common.errors import InputError
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.readers.media_items import with_defaults
from avatar_rl.prompts.readers.rows import Value
from avatar_rl.prompts.record import (
    PROBLEM_TYPE_SPELLINGS,
    MediaItem,
    MediaPlan,
    ProblemType,
    Prompt,
)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)
_LETTER = re.compile(r"^\s*\(?([A-Z])(?:\)|[.:]|$)\s*")
_LETTERED_LINE = re.compile(r"(?:^|\s)\(?([A-Z])[.):]\s*\S")


#: Raw values by the names of Prompt's fields.
RawField: TypeAlias = "Value | MediaPlan | Mapping[str, Value]"
Fields: TypeAlias = Mapping[str, RawField]


def build_prompt(fields: Fields, config: DataConfig, where: str) -> Prompt:
    """A Prompt from Prompt-named raw ``fields``: tags unwrapped, spellings folded, options
    lettered, defaults filled.

    Raises InputError for a missing question or answer, an unknown problem type, or a multiple
    choice without letters."""
    values = {key: value for key, value in fields.items() if value is not None}
    question = _text(values, "question", where)
    answer = unwrap(_text(values, "answer", where))
    if not answer:
        raise InputError(where, "the answer is empty", "give the ground truth, or drop the row")
    options = _options(values.get("options"), where)
    kind = _problem_type(values.get("problem_type"), options, answer, config, where)
    if kind is ProblemType.MULTIPLE_CHOICE:
        answer = _letter(answer, options, question, where)
    question = _without_lines(question, options)
    plan = _plan(values.get("media"), config, where)
    if config.system is not None:
        values.setdefault("system", config.system)
    if isinstance(reasoning := values.get("reasoning"), str):
        values["reasoning"] = thought(reasoning) or reasoning.strip()
    given_id = values.get("id")
    unnamed = given_id is None or given_id == ""
    checked = {
        "id": content_id(question, answer, options, plan) if unnamed else str(given_id),
        "question": question,
        "answer": answer,
        "options": options,
        "problem_type": kind,
        "media": plan,
    }
    try:
        return Prompt.model_validate(values | checked)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(
            where, f"field {place!r}: {detail['msg']}{more}", "correct or remove the field"
        ) from error


def unwrap(text: str) -> str:
    """What the last <answer> tag holds, or the text without its <think> part where there is
    none."""
    found = _ANSWER.findall(text)
    return (found[-1] if found else _THINK.sub("", text)).strip()


def thought(text: str) -> str | None:
    """What the first <think> tag holds."""
    found = _THINK.search(text)
    return found[1].strip() if found else None


def split_option(option: str) -> tuple[str, str]:
    """("A", "red") of "A. red", "(A) red" or "A: red"; no letter, ("", option)."""
    match = _LETTER.match(option)
    return (match[1], option[match.end() :].strip()) if match else ("", option)


def content_id(question: str, answer: str, options: tuple[str, ...], plan: MediaPlan) -> str:
    """Id of a row that names none. The same content gives the same id everywhere."""
    media = plan.model_dump(mode="json", include={"items"})
    content = [question, answer, list(options), media]
    return "c" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _text(values: Fields, key: str, where: str) -> str:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        what = f"no {key}" if value is None else f"the {key} is a {type(value).__name__}"
        raise InputError(where, what, f"give the {key} as text, or drop the row")
    text = str(value).strip()
    if not text:
        raise InputError(where, f"the {key} is empty", f"give the {key}, or drop the row")
    return text


def _problem_type(
    given: RawField, options: tuple[str, ...], answer: str, config: DataConfig, where: str
) -> ProblemType:
    if given is None:
        if config.problem_type is not None:
            return config.problem_type
        if options and _chosen(answer, options) is not None:
            return ProblemType.MULTIPLE_CHOICE
        raise InputError(
            where,
            "no problem type",
            "add problem_type to the row, or set data.reader.problem_type for all rows",
        )
    folded = re.sub(r"[\s\-/]+", "_", str(given).strip().lower())
    if folded not in PROBLEM_TYPE_SPELLINGS:
        known = ", ".join(sorted(PROBLEM_TYPE_SPELLINGS))
        raise InputError(where, f"unknown problem type {given!r}", f"use one of: {known}")
    return PROBLEM_TYPE_SPELLINGS[folded]


def _options(given: RawField, where: str) -> tuple[str, ...]:
    """Options as "A. red", whether they came as texts, lettered texts or a dict by letter."""
    if not given:
        return ()
    if isinstance(given, dict):  # parquet gives every row all keys, the absent ones as None
        given = [f"{letter}. {text!s}" for letter, text in given.items() if text is not None]
    if not isinstance(given, list | tuple) or not all(
        isinstance(option, str | int | float) for option in given
    ):
        raise InputError(
            where, "options are not a list of texts", "give them as ['A. red', 'B. green']"
        )
    texts = [str(option).strip() for option in given]
    if all(_LETTER.match(text) for text in texts):
        return tuple(texts)
    return tuple(f"{chr(ord('A') + index)}. {text}" for index, text in enumerate(texts))


def _chosen(answer: str, options: tuple[str, ...]) -> str | None:
    """Letter of the option that ``answer`` names by its letter, its text or both."""
    letters = dict(split_option(option) for option in options)
    named = _LETTER.match(answer)
    if named and named[1] in letters and answer[named.end() :].strip() in ("", letters[named[1]]):
        return named[1]
    same = [letter for letter, text in letters.items() if text.lower() == answer.lower()]
    return same[0] if len(same) == 1 else None


def _letter(answer: str, options: tuple[str, ...], question: str, where: str) -> str:
    if options:
        letter = _chosen(answer, options)
        if letter is None:
            raise InputError(
                where,
                f"the answer {answer!r} is none of the options {list(options)}",
                "correct either",
            )
        return letter
    offered = set(_LETTERED_LINE.findall(question))
    named = _LETTER.match(answer)
    if len(offered) < 2:
        raise InputError(
            where,
            "multiple choice without options",
            "add options: ['A. ...', 'B. ...'], or name another problem_type",
        )
    if named is None or named[1] not in offered:
        raise InputError(
            where,
            f"the answer {answer!r} is not one of the letters {sorted(offered)}",
            "give the letter as answer",
        )
    return named[1]


def _without_lines(question: str, options: tuple[str, ...]) -> str:
    """``question`` without lines that only repeat an option: the template adds the options
    itself."""
    if not options:
        return question
    kept = [line for line in question.splitlines() if line.strip() not in options]
    while kept and kept[-1].strip().lower() in ("options:", "choices:", ""):
        kept.pop()
    return "\n".join(kept).strip() or question


def _plan(given: RawField, config: DataConfig, where: str) -> MediaPlan:
    """The media plan with decode defaults, and the videos' sound tracks where the config asks for
    them."""
    try:
        plan = MediaPlan.model_validate(given or {})
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in ("media", *detail["loc"]))
        raise InputError(
            where, f"field {place!r}: {detail['msg']}", "correct the media entry"
        ) from error
    items = [with_defaults(item, config) for item in plan.items]
    if not config.audio_in_video or plan.audio_in_video or not plan.of("video"):
        return plan.model_copy(update={"items": tuple(items)})
    if plan.of("audio"):
        raise InputError(
            where,
            "has audio of its own beside its video",
            "set data.reader.audio_in_video: false, or the row's own flag",
        )
    tracks = [
        with_defaults(
            MediaItem(kind="audio", uri=item.uri, clip=item.clip, digest=item.digest), config
        )
        for item in items
        if item.kind == "video"
    ]
    return MediaPlan(items=(*items, *tracks), audio_in_video=True)
