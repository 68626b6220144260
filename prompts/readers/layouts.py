"""The row layouts that are read, and how one is recognised by its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from avatar_rl.common.errors import InputError
from avatar_rl.common.text import shortened
from avatar_rl.prompts.config import DataConfig, DatasetFormat
from avatar_rl.prompts.readers.build import Fields, RawField, build_prompt, thought
from avatar_rl.prompts.readers.chat import Chat, read_chat
from avatar_rl.prompts.readers.rows import Value, Values
from avatar_rl.prompts.record import MediaPlan, Prompt

_IDS = ("id", "problem_id", "question_id", "uid")
_QUESTIONS = ("problem", "question", "query", "prompt")
_ANSWERS = ("solution", "answer", "ground_truth", "response", "completion")
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
_AUDIO_CAPTIONS = ("audio_caption", "audio_cues")  # the latter is AVATAR's
_REASONING = ("reasoning", "process")  # the latter is Video-R1-COT's
#: Words in the name of a column that say what it holds, and files that are media by their suffix.
_KIND_WORDS = {
    "video": ("video", "vid", "clip", "movie", "frame", "youtube", "yt"),
    "audio": ("audio", "sound", "wav", "speech", "recording"),
    "image": ("image", "img", "picture", "photo", "screenshot"),
}
_MEDIA_COLUMN = re.compile(
    rf"(?i)(?:^|[_\W])({'|'.join(word for words in _KIND_WORDS.values() for word in words)})s?"
    r"(?:[_\s-]?(?:id|uid|path|file|filename|file_name|name|url|uri|key|dir"
    r"|bytes|base64|b64|data|link))?s?$"
)
_MEDIA_FILE = re.compile(
    r"(?i)\.(?:mp4|mkv|webm|avi|mov|m4v|mpg|mpeg|flv|wmv|3gp|wav|mp3|flac|ogg|opus|m4a|aac|jpe?g|png|webp"
    r"|bmp|gif|tiff?|heic|heif|avif|jxl|ts|m2ts|mts|ogv|mxf|wma|aiff?|amr|caf|mka|m4b|pdf)(?:[?#]\S*)?$"
    r"|^https?://(?:\w+\.)?(?:youtube\.com/(?:watch|shorts|embed)|youtu\.be/|vimeo\.com/|bilibili\.com/video)"
)
_GROUNDING = re.compile(r"<(?:ref-object|bbox)>")
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
    if "question" in row and set(row) <= set(Prompt.model_fields):
        return "native"
    if any(key in row for key in _QUESTIONS):
        return "conversational"
    raise InputError(
        where,
        f"layout not recognised from the keys {shortened(str(sorted(row)))}",
        "set data.reader.format to native, conversational, swift or verl, or convert the rows "
        "(docs/data.md)",
    )


def read_row(row: Values, layout: DatasetFormat, config: DataConfig, where: str) -> Prompt:
    """The prompt of a row. Raises InputError saying what is wrong with it."""
    if row.get("objects") is not None or _GROUNDING.search(str(row.get("messages"))):
        raise InputError(
            where,
            "a grounding row: <ref-object> and <bbox> are filled from `objects`, which is not read",
            "write the names and boxes into the text, and drop `objects`",
        )
    prompt = build_prompt(_FIELDS[layout](row, config, where), config, where)
    if layout != "native":  # whose keys are all known
        _check_blind(row, prompt, config, where)
    return prompt


def _check_blind(row: Values, prompt: Prompt, config: DataConfig, where: str) -> None:
    """Raises InputError for a column that names media which the prompt would be asked without."""
    kinds = {item.kind for item in prompt.media.items}
    for key, value in row.items():
        if key in _MEDIA or key in config.ignore_columns or value in (None, "", [], {}):
            continue
        named = _MEDIA_COLUMN.search(key)
        kind = next((k for k, words in _KIND_WORDS.items() if named and named[1] in words), None)
        is_path = any(_looks_like_media(entry) for entry in _flat(value))
        missing = kind not in kinds if kind is not None else not kinds
        if missing and (is_path or (named is not None and _is_name(value))):
            raise InputError(
                where,
                f"column {key!r} names media ({shortened(str(value), 60)}) that are not read: the "
                "question would be asked blind",
                "rename the column to video, audio or image, or list it in "
                "data.reader.ignore_columns",
            )


def _flat(value: Value) -> list[Value]:
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [leaf for entry in value for leaf in _flat(entry)] if isinstance(value, list) else [value]
    )


def _looks_like_media(value: Value) -> bool:
    if isinstance(value, bytes):
        return True
    return isinstance(value, str) and len(value) < 4096 and bool(_MEDIA_FILE.search(value))


def _is_name(value: Value) -> bool:
    """A path, an id or a list of them; no description and no yes or no."""
    if isinstance(value, list):
        return bool(value) and all(_is_name(entry) for entry in value)
    if isinstance(value, bytes | dict):
        return True
    if isinstance(value, bool) or value is None:
        return False
    return isinstance(value, int) or len(str(value).split()) == 1


def _native(row: Values, config: DataConfig, where: str) -> Fields:
    return row


def _chat(row: Values, config: DataConfig, where: str) -> Fields:
    """Conversational, ms-swift, Video-R1 and AVATAR rows: messages, or a question with media beside
    it."""
    fields: dict[str, RawField] = {key: row.get(key) for key in _SHARED}
    fields["audio_caption"] = _first(row, _AUDIO_CAPTIONS)
    fields |= {"reasoning": _first(row, _REASONING), "id": _first(row, _IDS)}
    answer = _first(row, _ANSWERS)
    if isinstance(answer, list):  # a completion as messages
        answer = next((m.get("content") for m in answer if isinstance(m, dict)), None)
    messages = _first_list(row, _MESSAGES)
    if messages is None:
        question = _first(row, _QUESTIONS)
        text = question if isinstance(question, str) else ""
        # the question's tags are places, too
        chat = read_chat([{"role": "user", "content": text}], row, config, where)
        fields |= {
            "question": chat.question if text else question,
            "media": _media(chat),
        }
    else:
        chat = read_chat(messages, row, config, where)
        fields |= {"question": chat.question, "media": _media(chat)}
        fields["system"] = fields["system"] or chat.system
        if chat.target is not None:
            answer = chat.target if answer is None else answer
            fields["reasoning"] = fields["reasoning"] or thought(chat.target)
    if isinstance(answer, str):
        fields["reasoning"] = fields["reasoning"] or thought(answer)
    used = {
        *_SHARED,
        *_AUDIO_CAPTIONS,
        *_REASONING,
        *_IDS,
        *_QUESTIONS,
        *_ANSWERS,
        *_MESSAGES,
        *_MEDIA,
    }
    return fields | {"answer": answer, "extra": _others(row, used, config, where)}


def _media(chat: Chat) -> MediaPlan:
    return MediaPlan(items=tuple(chat.items), in_text=chat.in_text)


def _verl(row: Values, config: DataConfig, where: str) -> Fields:
    chat = read_chat(row.get("prompt"), row, config, where)
    info, judged = (_object(row, key, where) for key in ("extra_info", "reward_model"))
    source = row.get("data_source")
    index = info.get("index")
    place = (source, info.get("split"), str(index))
    extra = _others(info, {*_SHARED, "question", "answer"}, config, where)
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
        "media": _media(chat),
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


def _others(row: Values, used: set[str], config: DataConfig, where: str) -> Values:
    """What else a row carries, for rewards of one's own (Prompt.extra)."""
    return {
        key: _json(value, key, where)
        for key, value in row.items()
        if key not in used and key not in config.ignore_columns
    }


def _json(value: Value, key: str, where: str) -> Value:
    """``value`` as JSON has it; dates and decimals of parquet become text."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(name): _json(inner, key, where) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner, key, where) for inner in value]
    if isinstance(value, bytes):
        raise InputError(
            where,
            f"column {key!r} holds {len(value)} bytes",
            "drop the column, or list it in data.reader.ignore_columns",
        )
    return str(value)


def without_absent(row: Values) -> Values:
    """The row without what is absent: Arrow fills keys with None, pandas with NaN."""
    return {key: _dense(value) for key, value in row.items() if not _absent(value)}


def _dense(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _dense(inner) for key, inner in value.items() if not _absent(inner)}
    return [_dense(inner) for inner in value] if isinstance(value, list) else value


def _absent(value: Value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
