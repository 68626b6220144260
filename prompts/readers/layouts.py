"""The row layouts that are read, and how one is recognised by its keys."""

from __future__ import annotations

from collections.abc import Callable

from avatar_rl.common.errors import InputError
from avatar_rl.prompts.config import DataConfig, DatasetFormat
from avatar_rl.prompts.readers.build import Fields, RawField, build_prompt, thought
from avatar_rl.prompts.readers.chat import read_chat
from avatar_rl.prompts.readers.rows import Value, Values
from avatar_rl.prompts.record import MediaPlan, Prompt

_IDS = ("id", "problem_id", "question_id", "uid")
_QUESTIONS = ("problem", "question")
_ANSWERS = ("solution", "answer", "ground_truth")
_MESSAGES = ("messages", "prompt", "conversations")
#: Prompt fields that other layouts may carry under the same name.
_SHARED = (
    "options",
    "problem_type",
    "system",
    "hint",
    "caption",
    "audio_caption",
    "category",
    "needs",
)
_REASONING = ("reasoning", "process")  # the latter is Video-R1-COT's
_MEDIA = {f"{kind}{end}" for kind in ("video", "audio", "image") for end in ("", "s", "_path")} | {
    "path",
    "data_type",
}


def detect(row: Values, where: str) -> DatasetFormat:
    """Layout of a row by its keys. Raises InputError where none fits."""
    if isinstance(row.get("reward_model"), dict) and isinstance(row.get("prompt"), list):
        return "verl"
    # No other layout has it. A misspelt key beside it is then named, not lost.
    if isinstance(row.get("media"), dict):
        return "native"
    messages = _first_list(row, _MESSAGES)
    if messages is not None:
        parts = any(
            isinstance(message, dict) and isinstance(message.get("content"), list)
            for message in messages
        )
        return "conversational" if parts or row.get("messages") is None else "swift"
    if row.get("question") is not None and set(row) <= set(Prompt.model_fields):
        return "native"
    if any(row.get(key) is not None for key in _QUESTIONS):
        return "conversational"
    raise InputError(
        where,
        f"layout not recognised from the keys {sorted(row)}",
        "set data.reader.format to native, conversational, swift or verl, or convert the rows "
        "(docs/data.md)",
    )


def read_row(row: Values, layout: DatasetFormat, config: DataConfig, where: str) -> Prompt:
    """The prompt of a row. Raises InputError saying what is wrong with it."""
    return build_prompt(_FIELDS[layout](row, config, where), config, where)


def _native(row: Values, config: DataConfig, where: str) -> Fields:
    return {key: _without_none(value) for key, value in row.items() if value is not None}


def _chat(row: Values, config: DataConfig, where: str) -> Fields:
    """Conversational, ms-swift, Video-R1 and AVATAR rows: messages, or a question with media beside
    it."""
    fields: dict[str, RawField] = {key: row.get(key) for key in _SHARED}
    fields |= {"reasoning": _first(row, _REASONING), "id": _first(row, _IDS)}
    answer = _first(row, _ANSWERS)
    messages = _first_list(row, _MESSAGES)
    if messages is None:
        question = _first(row, _QUESTIONS)
        text = question if isinstance(question, str) else ""
        # the question's tags are places, too
        chat = read_chat([{"role": "user", "content": text}], row, config, where)
        fields |= {
            "question": chat.question if text else question,
            "media": MediaPlan(items=tuple(chat.items)),
        }
    else:
        chat = read_chat(messages, row, config, where)
        fields |= {"question": chat.question, "media": MediaPlan(items=tuple(chat.items))}
        fields["system"] = fields["system"] or chat.system
        if chat.target is not None:
            answer = chat.target if answer is None else answer
            fields["reasoning"] = fields["reasoning"] or thought(chat.target)
    if isinstance(answer, str):
        fields["reasoning"] = fields["reasoning"] or thought(answer)
    used = {*_SHARED, *_REASONING, *_IDS, *_QUESTIONS, *_ANSWERS, *_MESSAGES, *_MEDIA}
    return fields | {"answer": answer, "extra": _scalars(row, used)}


def _verl(row: Values, config: DataConfig, where: str) -> Fields:
    chat = read_chat(row.get("prompt"), row, config, where)
    info, judged = (_object(row, key, where) for key in ("extra_info", "reward_model"))
    source = row.get("data_source")
    index = info.get("index")
    place = (source, info.get("split"), str(index))
    extra: Values = {**_scalars(info, {*_SHARED, "question", "answer"})}
    if source is not None:
        extra["data_source"] = source
    fields: dict[str, RawField] = {
        key: row.get(key) if row.get(key) is not None else info.get(key) for key in _SHARED
    }
    return fields | {
        "id": _first(row, _IDS)
        or (None if index is None else "/".join(str(part) for part in place if part)),
        "question": chat.question,
        "answer": judged.get("ground_truth"),
        "system": fields["system"] or chat.system,
        "media": MediaPlan(items=tuple(chat.items)),
        "category": fields["category"] or row.get("ability") or "",
        "extra": extra,
    }


_FIELDS: dict[str, Callable[[Values, DataConfig, str], Fields]] = {
    "native": _native,
    "conversational": _chat,
    "swift": _chat,
    "verl": _verl,
}


def _object(row: Values, key: str, where: str) -> Values:
    value = row.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(
            where, f"{key} is a {type(value).__name__}", f"give {key} as an object, as verl does"
        )
    return value


def _first(row: Values, keys: tuple[str, ...]) -> Value:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _first_list(row: Values, keys: tuple[str, ...]) -> list[Value] | None:
    values = (row.get(key) for key in keys)
    return next((value for value in values if isinstance(value, list)), None)


def _scalars(row: Values, used: set[str]) -> dict[str, str]:
    """What else a row carries, as text (Prompt.extra)."""
    return {
        key: str(value)
        for key, value in row.items()
        if key not in used and isinstance(value, str | int | float)
    }


def _without_none(value: Value) -> Value:
    """Arrow fills absent keys with None; a Prompt row simply leaves them out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
