"""Raw fields of a row checked and brought into the one form of a Prompt."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import TypeAlias

from pydantic import ValidationError

from avatar_rl.common.errors import InputError
from avatar_rl.common.text import shortened
from avatar_rl.prompts.choices import choice_letter, lettered, split_option
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.readers.media_items import with_defaults
from avatar_rl.prompts.readers.places import PLACE, check_places, check_tokens
from avatar_rl.prompts.readers.rows import Value
from avatar_rl.prompts.readers.truth import check_labels, plain_truth, result, thought
from avatar_rl.prompts.record import (
    PROBLEM_TYPE_SPELLINGS,
    MediaItem,
    MediaPlan,
    ProblemType,
    Prompt,
)

_PICTURE = re.compile(r"(?i)\.(?:jpe?g|png|webp|bmp|tiff?|heic|avif)(?:[?#].*)?$")
#: A missing value that was written as text.
_MISSING = frozenset({"nan", "NaN", "NAN", "<NA>", "NaT", "NULL", "#N/A"})
#: Texts of a prompt that may be absent.
_OPTIONAL = ("system", "hint", "caption", "audio_caption", "reasoning", "category")
_LONGEST_ID = 512
_LETTERED_LINE = re.compile(r"(?:^|\s)[(（]?([A-Z])[.．)）:：、]\s*\S")
_LETTERS = 26


#: Raw values by the names of Prompt's fields.
RawField: TypeAlias = "Value | MediaPlan | Mapping[str, Value]"
Fields: TypeAlias = Mapping[str, RawField]


def build_prompt(fields: Fields, config: DataConfig, where: str) -> Prompt:
    """A Prompt from Prompt-named raw ``fields``: tags unwrapped, spellings folded, options
    lettered, defaults filled.

    Raises InputError for a missing question or answer, an unknown problem type, or a multiple
    choice without letters."""
    values = {key: value for key, value in fields.items() if not _is_absent(key, value)}
    question = _text(values, "question", where)
    answer = plain_truth(_text(values, "answer", where), where)
    options = _options(values.get("options"), where)
    kind = _problem_type(values.get("problem_type"), options, answer, config, where)
    if kind is not ProblemType.OCR:  # whose text may hold anything
        answer = result(answer, kind, where)
    if kind is ProblemType.MULTIPLE_CHOICE:
        answer = _letter(answer, options, question, where)
    if kind is ProblemType.MULTI_LABEL and options:
        check_labels(answer, options, where)
    question = _without_lines(question, options)
    plan = _plan(values.get("media"), "\n".join((question, *options)), config, where)
    shown = {"question": question, "system": values.get("system"), "hint": values.get("hint")}
    for name, text in (shown | {"options": "\n".join(options)}).items():
        check_tokens(name, text if isinstance(text, str) else None, where)
    if config.system is not None:
        values.setdefault("system", config.system)
    if isinstance(reasoning := values.get("reasoning"), str):
        values["reasoning"] = thought(reasoning) or reasoning.strip()
    given_id = values.get("id")
    unnamed = given_id is None or given_id == ""
    checked = {
        "id": content_id(question, answer, options, plan) if unnamed else _id(given_id, where),
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


def content_id(question: str, answer: str, options: tuple[str, ...], plan: MediaPlan) -> str:
    """Id of a row that names none. The same content gives the same id everywhere."""
    media = plan.model_dump(mode="json", include={"items"})
    content = [question, answer, list(options), media]
    return "c" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _text(values: Fields, key: str, where: str) -> str:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        what = f"no {key}" if value is None else f"the {key} is a {type(value).__name__}"
        how = " (several labels with commas between them)" if isinstance(value, list) else ""
        raise InputError(where, what, f"give the {key} as text{how}, or drop the row")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            where, f"the {key} is {value}", f"give the {key} as a number, or drop the row"
        )
    text = str(value).strip()
    if all(unicodedata.category(letter)[0] in "CZ" for letter in text):  # none that is seen
        text = ""
    if text in _MISSING:
        raise InputError(
            where,
            f"the {key} is {text!r}, which is how a missing value is written",
            f"give the {key}, or drop the row",
        )
    if not text:
        raise InputError(where, f"the {key} is empty", f"give the {key}, or drop the row")
    return text


def _problem_type(
    given: RawField, options: tuple[str, ...], answer: str, config: DataConfig, where: str
) -> ProblemType:
    if given is None:
        if config.problem_type is not None:
            return config.problem_type
        if options and choice_letter(answer, options) is not None:
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
    texts = ["" if option != option else str(option).strip() for option in given]  # NaN: none
    if "" in texts:
        raise InputError(
            where,
            f"option {texts.index('') + 1} of {len(texts)} has no text",
            "give every option its text, or drop it",
        )
    if len(texts) > _LETTERS:
        raise InputError(
            where,
            f"{len(texts)} options, more than there are letters",
            "keep the likely ones, or name the problem_type free_form",
        )
    letters = [split_option(text)[0] for text in texts]
    if all(letters) and (twice := [letter for letter in letters if letters.count(letter) > 1]):
        raise InputError(
            where,
            f"two options have the letter {twice[0]}: {shortened(str(texts))}",
            "give each option a letter of its own",
        )
    return lettered(texts)


def _letter(answer: str, options: tuple[str, ...], question: str, where: str) -> str:
    if len(options) == 1:
        raise InputError(
            where,
            f"multiple choice with one option {shortened(options[0])!r}",
            "give all options, or name another problem_type",
        )
    if options:
        letter = choice_letter(answer, options)
        if letter is None:
            raise InputError(
                where,
                f"the answer {shortened(answer)!r} is none of the options "
                f"{shortened(str(list(options)))}",
                "correct either",
            )
        _check_one(letter, answer, options, where)
        return letter
    offered = set(_LETTERED_LINE.findall(question))
    named = choice_letter(answer, [f"{letter}." for letter in sorted(offered)])
    if len(offered) < 2:
        raise InputError(
            where,
            "multiple choice without options",
            "add options: ['A. ...', 'B. ...'], or name another problem_type",
        )
    if named is None:
        raise InputError(
            where,
            f"the answer {shortened(answer)!r} is not one of the letters {sorted(offered)}",
            "give the letter as answer",
        )
    return named


def _check_one(letter: str, answer: str, options: tuple[str, ...], where: str) -> None:
    """Raises InputError where another option is as right as that of ``letter``."""
    texts = dict(split_option(option) for option in options)
    if PLACE.fullmatch(texts[letter]):
        return  # the options are media
    meant = {texts[letter]}
    if len(answer) == 1:  # a letter, which may be the text of another option
        meant.add(answer)
    others = [other for other, text in texts.items() if other != letter and text in meant - {""}]
    if others:
        raise InputError(
            where,
            f"the answer {shortened(answer)!r} is both the option {letter} and {others[0]} of "
            f"{shortened(str(list(options)))}",
            "give options that differ",
        )


def _id(given: RawField, where: str) -> str:
    """An id as text. Raises InputError for one that is no name."""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise InputError(
            where, f"the id is a {type(given).__name__}", "give a text or a number, or no id at all"
        )
    text = str(given)
    if len(text) > _LONGEST_ID or text in ("inf", "-inf"):
        raise InputError(
            where,
            f"the id {shortened(text)!r} is no name ({len(text)} characters)",
            "give a short one, or no id at all",
        )
    return text


def _is_absent(key: str, value: RawField) -> bool:
    """What is not there, also as text: a hint of "nan" is none."""
    if value is None:
        return True
    return key in _OPTIONAL and isinstance(value, str) and value.strip() in ("", *_MISSING)


def _without_lines(question: str, options: tuple[str, ...]) -> str:
    """``question`` without lines that only repeat an option: the template adds the options
    itself."""
    if not options:
        return question
    kept = [line for line in question.splitlines() if line.strip() not in options]
    while kept and kept[-1].strip().lower() in ("options:", "choices:", ""):
        kept.pop()
    return "\n".join(kept).strip() or question


def _plan(given: RawField, asked: str, config: DataConfig, where: str) -> MediaPlan:
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
    check_places(asked, plan, where)
    for item in plan.items:
        if item.uri.startswith("data:"):
            raise InputError(
                where,
                f"{item.kind} is embedded as a data URL ({len(item.uri)} characters)",
                "write it to a file and give its path",
            )
        if item.kind == "video" and _PICTURE.search(item.uri):
            raise InputError(
                where,
                f"a picture is given as video: {shortened(item.uri)}",
                "give it as image; frame lists are not read: make a video (ffmpeg -framerate FPS "
                "-i %04d.jpg OUT.mp4)",
            )
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
    return MediaPlan(items=(*items, *tracks), in_text=plan.in_text, audio_in_video=True)
