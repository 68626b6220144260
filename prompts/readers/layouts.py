"""The row layouts that are read, and how one is recognised by its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from avatar_rl.common.errors import InputError
from avatar_rl.common.text import shortened
from avatar_rl.prompts.config import DataConfig, DatasetFormat
from avatar_rl.prompts.readers.build import Fields, RawField, build_prompt
from avatar_rl.prompts.readers.chat import Chat, read_chat
from avatar_rl.prompts.readers.rows import Value, Values
from avatar_rl.prompts.readers.truth import same_answer, thought
from avatar_rl.prompts.record import MediaPlan, Prompt

_IDS = ("id", "problem_id", "question_id", "uid")
_QUESTIONS = ("problem", "question", "query", "prompt")
_TRUTHS = ("solution", "answer", "ground_truth")
_ANSWERS = (*_TRUTHS, "response", "completion")
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
    rf"(?i)(?:^|[_\W])({'|'.join(word for words in _KIND_WORDS.values() for word in words)}"
    r"|visual|media)s?"
    r"((?:[_\s-]?(?:id|uid|path|file|filename|file_name|name|url|uri|key|dir"
    r"|bytes|base64|b64|data|link))?s?)[_\s-]?\d{0,3}$"
)
#: Keys of a media entry, which say nothing beside it.
_ENTRY_KEYS = (
    *("video_start", "video_end", "nframes", "fps"),
    *("min_pixels", "max_pixels", "sample_rate", "sampling_rate"),
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
    if isinstance(row.get("reward_model"), dict):
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
    if layout == "native":  # whose keys are all known
        return build_prompt(row, config, where)
    row = {key: value for key, value in row.items() if key not in config.ignore_columns}
    prompt = build_prompt(_FIELDS[layout](row, config, where), config, where)
    _check_blind(row, prompt, where)
    if prompt.media.items and (key := next((key for key in _ENTRY_KEYS if key in row), None)):
        raise InputError(
            where,
            f"column {key!r} says how a medium is read, but stands outside its entry",
            f'write it into the entry ({{"video": PATH, {key!r}: ...}}), or list it in '
            "data.reader.ignore_columns",
        )
    return prompt


def _check_blind(row: Values, prompt: Prompt, where: str) -> None:
    """Raises InputError for a column that names media which the prompt would be asked without."""
    kinds = {item.kind for item in prompt.media.items}
    for key, value in row.items():
        if key in _MEDIA or value in (None, "", [], {}):
            continue
        named = _MEDIA_COLUMN.search(key)
        kind = next(
            (k for k, words in _KIND_WORDS.items() if named and named[1].lower() in words), None
        )
        is_path = any(_looks_like_media(entry) for entry in _flat(value))
        missing = kind not in kinds if kind is not None else not kinds
        is_name = named is not None and (_is_name(value) or _is_file_name(named[2], value))
        if missing and (is_path or is_name):
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


def _is_file_name(suffix: str, value: Value) -> bool:
    """A name with blanks in it, in a column that says that it is one."""
    return bool(suffix.strip("sS")) and isinstance(value, str) and len(value) < 256


def _chat(row: Values, config: DataConfig, where: str) -> Fields:
    """Conversational, ms-swift, Video-R1 and AVATAR rows: messages, or a question with media beside
    it."""
    fields: dict[str, RawField] = {key: row.get(key) for key in _SHARED}
    fields["audio_caption"] = _first(row, _AUDIO_CAPTIONS)
    fields |= {"reasoning": _first(row, _REASONING), "id": _first(row, _IDS)}
    answer = _answer(row, where)
    messages = _first_list(row, _MESSAGES)
    for key in ("messages", "conversations"):
        if row.get(key) is not None and not isinstance(row[key], list):
            raise InputError(
                where,
                f"{key} is a {type(row[key]).__name__}",
                "give a list of {role, content}, parsed if it is JSON inside a text",
            )
    if messages is None:
        question = _first(row, _QUESTIONS)
        _refuse_two(row, _QUESTIONS, where)
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
    return fields | {"answer": answer, "extra": _others(row, used, where)}


def _answer(row: Values, where: str) -> Value:
    """The row's truth; of a completion as messages, the only one."""
    _refuse_two(row, _TRUTHS, where)
    answer = _first(row, _ANSWERS)
    if not isinstance(answer, list) or not any(isinstance(m, dict) for m in answer):
        return answer
    said = [m.get("content") for m in answer if isinstance(m, dict)]
    if len(said) > 1:
        raise InputError(where, f"{len(said)} completions", "keep the one that is the truth")
    return said[0]


def _refuse_two(row: Values, keys: tuple[str, ...], where: str) -> None:
    """Raises InputError where columns that mean the same say different things."""
    given = {key: row[key] for key in keys if isinstance(row.get(key), str | int | float)}
    texts = {key: same_answer(str(value)) for key, value in given.items() if str(value).strip()}
    if len(set(texts.values())) > 1:
        raise InputError(
            where,
            f"the columns {' and '.join(map(repr, texts))} say different things",
            "keep the one that is meant, and list the others in data.reader.ignore_columns",
        )


def _media(chat: Chat) -> MediaPlan:
    return MediaPlan(items=tuple(chat.items), in_text=chat.in_text)


def _verl(row: Values, config: DataConfig, where: str) -> Fields:
    chat = read_chat(row.get("prompt"), row, config, where)
    info, judged = (_object(row, key, where) for key in ("extra_info", "reward_model"))
    source = row.get("data_source")
    index = info.get("index")
    place = (source, info.get("split"), str(index))
    info = {key: value for key, value in info.items() if key not in config.ignore_columns}
    extra = _others(info, {*_SHARED, "question", "answer"}, where)
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


def _others(row: Values, used: set[str], where: str) -> Values:
    """What else a row carries, for rewards of one's own (Prompt.extra)."""
    return {key: _json(value, key, where) for key, value in row.items() if key not in used}


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
