"""Raw fields of a row checked and brought into the one form of a Prompt."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import TypeAlias

from pydantic import ValidationError

from avatar_rl.common.errors import InputError
from avatar_rl.common.text import normalise, shortened
from avatar_rl.prompts.choices import choice_letter, lettered
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

#: Tags as they are written: "<Answer >", "&lt;answer&gt;" too.
_SPELLED_TAG = re.compile(
    r"(?:<|&lt;)\s*(/?)\s*(?:final[_ ])?(answer|think|thinking)\s*(?:>|&gt;)", re.IGNORECASE
)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
#: What a format of answers or turns left behind, and which is nobody's answer.
_LEFTOVER = re.compile(
    r"</?(?:ans|output|response|result|solution|reason|reasoning|thought|analysis|reflection)>",
    re.IGNORECASE,
)
_CHANNEL = re.compile(r"\A.*<\|message\|>", re.DOTALL)  # all but the last message of gpt-oss
_THINK = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_THINK_TAG = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
#: What ends a turn in the chat formats that data were exported from.
_STOP = re.compile(
    r"(?:<\|[\w-]{1,30}\|>|</s>|\A\s*<s>|<\uff5c[^<>]{1,40}\uff5c>|\[/?INST\]"
    r"|<(?:eos|bos|pad|eot|im_start|im_end|start_of_turn|end_of_turn|end_of_utterance)>)"
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_PICTURE = re.compile(r"(?i)\.(?:jpe?g|png|webp|bmp|tiff?|heic|avif)(?:[?#].*)?$")
#: A missing value that was written as text.
_MISSING = frozenset({"nan", "NaN", "<NA>", "NaT"})
_LETTERED_LINE = re.compile(r"(?:^|\s)[(（]?([A-Z])[.．)）:：、]\s*\S")
_LETTERS = 26
_NUMBERS = (ProblemType.NUMERICAL, ProblemType.REGRESSION)


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
    answer = _truth(_text(values, "answer", where), where)
    options = _options(values.get("options"), where)
    kind = _problem_type(values.get("problem_type"), options, answer, config, where)
    if kind is not ProblemType.OCR:  # whose text may hold anything
        answer = _result(answer, kind, where)
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
    """What the last <answer> tag holds, closed or not, or the text without its <think> part where
    there is none; tokens that end a turn are left out."""
    plain = _plain(text)
    found = [inside.strip() for inside in _ANSWER.findall(plain) if inside.strip()]
    return (found[-1] if found else _ANSWER_TAG.sub("", _THINK.sub("", plain))).strip()


def _plain(text: str) -> str:
    """``text`` without what ends turns, its answer and think tags in their usual spelling."""
    plain = _STOP.sub("", _CHANNEL.sub("", text))
    return _SPELLED_TAG.sub(lambda tag: f"<{tag[1]}{tag[2].lower()}>", plain)


def _truth(text: str, where: str) -> str:
    given = {normalise(inside) for inside in _ANSWER.findall(_plain(text)) if inside.strip()}
    if len(given) > 1:
        raise InputError(
            where,
            f"the answer is tagged several times: {shortened(', '.join(sorted(given)))}",
            "keep the one that is meant",
        )
    answer = unwrap(text)
    if tag := _LEFTOVER.search(answer):
        raise InputError(
            where,
            f"the answer {shortened(text)!r} holds the tag {tag[0]}",
            "give the ground truth alone",
        )
    if _THINK_TAG.search(answer):
        raise InputError(
            where,
            f"the answer {shortened(text)!r} has a think tag without its partner",
            "give the ground truth alone, or close the tags",
        )
    if not answer:
        raise InputError(where, "the answer is empty", "give the ground truth, or drop the row")
    whole = _BOXED.fullmatch(answer.strip("$ "))
    return whole[1].strip() if whole and whole[1].strip() else answer


def _result(answer: str, kind: ProblemType, where: str) -> str:
    """The result of a worked solution: what stands behind "####" (of a number or a choice) or in
    the only box."""
    if "####" in answer and kind in (*_NUMBERS, ProblemType.MULTIPLE_CHOICE):
        answer = answer.rpartition("####")[2].strip()
        if not answer:
            raise InputError(
                where, "the answer ends with ####", "give the number behind it, or drop the row"
            )
    boxed = {content.strip() for content in _BOXED.findall(answer)}
    if len(boxed) > 1:
        raise InputError(
            where,
            f"the answer boxes several values: {shortened(', '.join(sorted(boxed)))}",
            "give the one that is meant",
        )
    return (boxed.pop() or answer) if boxed else answer


def thought(text: str) -> str | None:
    """What the first <think> tag holds."""
    found = _THINK.search(text)
    return found[1].strip() if found else None


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
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(
            where, f"the {key} is {value}", f"give the {key} as a number, or drop the row"
        )
    text = str(value).strip()
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
    for item in plan.items:
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
