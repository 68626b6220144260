"""The row layouts that are read, and how one is recognised by its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avatar_rl.common.errors import InputError
from avatar_rl.prompts.config import DataConfig, DatasetFormat
from avatar_rl.prompts.readers.build import build_prompt, thought
from avatar_rl.prompts.readers.chat import read_chat
from avatar_rl.prompts.record import Prompt

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


def detect(row: dict[str, Any], where: str) -> DatasetFormat:
    """Layout of a row by its keys. Raises InputError where none fits."""
    if isinstance(row.get("reward_model"), dict) and isinstance(row.get("prompt"), list):
        return "verl"
    if isinstance(
        row.get("media"), dict
    ):  # no other layout has it; a misspelt key is then named, not lost
        return "native"
    messages = next((row[key] for key in _MESSAGES if isinstance(row.get(key), list)), None)
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


def read_row(row: dict[str, Any], layout: DatasetFormat, config: DataConfig, where: str) -> Prompt:
    """The prompt of a row. Raises InputError saying what is wrong with it."""
    return build_prompt(_FIELDS[layout](row, config, where), config, where)


def _native(row: dict[str, Any], config: DataConfig, where: str) -> dict[str, Any]:
    dense: dict[str, Any] = _without_none(row)
    return dense


def _chat(row: dict[str, Any], config: DataConfig, where: str) -> dict[str, Any]:
    """Conversational, ms-swift, Video-R1 and AVATAR rows: messages, or a question with media beside
    it."""
    fields = {key: row.get(key) for key in _SHARED} | {
        "reasoning": _first(row, _REASONING),
        "id": _first(row, _IDS),
    }
    answer = _first(row, _ANSWERS)
    messages = next((row[key] for key in _MESSAGES if isinstance(row.get(key), list)), None)
    if messages is None:
        question = _first(row, _QUESTIONS)
        text = question if isinstance(question, str) else ""
        chat = read_chat(
            [{"role": "user", "content": text}], row, config, where
        )  # its tags are places, too
        fields |= {"question": chat.question if text else question, "media": {"items": chat.items}}
    else:
        chat = read_chat(messages, row, config, where)
        fields |= {"question": chat.question, "media": {"items": chat.items}}
        fields["system"] = fields["system"] or chat.system
        if chat.target is not None:
            answer = chat.target if answer is None else answer
            fields["reasoning"] = fields["reasoning"] or thought(chat.target)
    if isinstance(answer, str):
        fields["reasoning"] = fields["reasoning"] or thought(answer)
    used = {*_SHARED, *_REASONING, *_IDS, *_QUESTIONS, *_ANSWERS, *_MESSAGES, *_MEDIA}
    return fields | {"answer": answer, "extra": _scalars(row, used)}


def _verl(row: dict[str, Any], config: DataConfig, where: str) -> dict[str, Any]:
    chat = read_chat(row.get("prompt"), row, config, where)
    info, judged = (_object(row, key, where) for key in ("extra_info", "reward_model"))
    source = row.get("data_source")
    index = info.get("index")
    place = (source, info.get("split"), str(index))
    fields = {key: row.get(key) if row.get(key) is not None else info.get(key) for key in _SHARED}
    return fields | {
        "id": _first(row, _IDS)
        or (None if index is None else "/".join(str(part) for part in place if part)),
        "question": chat.question,
        "answer": judged.get("ground_truth"),
        "system": fields["system"] or chat.system,
        "media": {"items": chat.items},
        "category": fields["category"] or row.get("ability") or "",
        "extra": _scalars(info, {*_SHARED, "question", "answer"})
        | ({} if source is None else {"data_source": source}),
    }


_FIELDS: dict[str, Callable[[dict[str, Any], DataConfig, str], dict[str, Any]]] = {
    "native": _native,
    "conversational": _chat,
    "swift": _chat,
    "verl": _verl,
}


def _object(row: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = row.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(
            where, f"{key} is a {type(value).__name__}", f"give {key} as an object, as verl does"
        )
    return value


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _scalars(row: dict[str, Any], used: set[str]) -> dict[str, str]:
    """What else a row carries, as text (Prompt.extra)."""
    return {
        key: str(value)
        for key, value in row.items()
        if key not in used and isinstance(value, str | int | float)
    }


def _without_none(value: Any) -> Any:
    """Arrow fills absent keys with None; a Prompt row simply leaves them out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
