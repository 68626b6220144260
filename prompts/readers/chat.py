"""One question out of chat messages: content lists with typed parts, or text with
<video><audio><image> tags."""

from __future__ import annotations

import re
from dataclasses import dataclass

from avatar_rl.common.errors import InputError
from avatar_rl.common.text import shortened
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.readers.media_items import KINDS, media_item
from avatar_rl.prompts.readers.rows import Value, Values
from avatar_rl.prompts.record import MediaItem, Modality

_TAG = re.compile(r"<(video|audio|image)>")
_PICTURE = re.compile(r"(?i)\.(?:jpe?g|png|webp|bmp|tiff?)$")
_TAG_ONLY = re.compile(r"<(?:video|audio|image)>")


@dataclass
class Chat:
    """What a conversation of one user turn holds."""

    question: str
    system: str | None
    target: (
        str | None
    )  # the assistant's turn: SFT target and, where nothing else names it, the answer
    items: list[MediaItem]  # in the order of their placeholders
    in_text: bool  # the question keeps its <video>, <audio> and <image> places


def read_chat(messages: Value, row: Values, config: DataConfig, where: str) -> Chat:
    """The user turn's text and media; media without a path of their own come from the row's lists
    in turn."""
    waiting = _listed(row, where)
    turns: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    items: list[MediaItem] = []
    in_text = False
    for message in _messages(messages, where):
        role = message["role"]
        if not isinstance(role, str) or role not in turns:
            raise InputError(
                where, f"message of the role {role!r}", "only system, user and assistant are read"
            )
        if role == "assistant" and not turns["user"]:
            raise InputError(
                where,
                "the assistant speaks before the user",
                "begin with the question, and let the ground truth or its reasoning follow",
            )
        text, found = _content(message.get("content"), waiting, config, where)
        if placed := len([part for part in _TAG_ONLY.split(text) if part.strip()]) > 1 and found:
            if role != "user":
                raise InputError(
                    where,
                    f"media between the words of the {role} turn",
                    "put them into the user turn, or in front of the text",
                )
            in_text = True
        if found and role == "assistant":
            raise InputError(
                where,
                f"{len(found)} media in the assistant's turn",
                "put them into the user turn, or drop the tags",
            )
        turns[role].append(text if placed else _TAG_ONLY.sub("", text).strip())
        items += found
    if len(turns["user"]) != 1:
        raise InputError(
            where,
            f"{len(turns['user'])} user turns",
            "a prompt asks one question: split or join the conversation",
        )
    if not items:  # ms-swift also takes lists without tags, and puts the media first
        items = [
            media_item(waiting[kind].pop(0), kind, config, where)
            for kind in KINDS
            for _ in list(waiting[kind])
        ]
    _claim_path(row, bool(items), where)
    for kind, rest in waiting.items():
        if rest:
            raise InputError(
                where,
                f"{len(rest)} more {kind}s than <{kind}> places in the text",
                "add the tag, or drop the file",
            )
    system = "\n".join(turns["system"]).strip() or None
    return Chat(
        turns["user"][0],
        system,
        turns["assistant"][-1] if turns["assistant"] else None,
        items,
        in_text,
    )


def _messages(given: Value, where: str) -> list[Values]:
    messages = given if isinstance(given, list) else [None]
    found = [message for message in messages if isinstance(message, dict) and "role" in message]
    if len(found) != len(messages):
        first = next(iter(messages), None)
        keys = f" but of {sorted(first)}" if isinstance(first, dict) else ""
        raise InputError(
            where,
            f"messages are not a list of {{role, content}}{shortened(keys)}",
            "write them as role (system, user, assistant) and content; ShareGPT has from (human, "
            "gpt) and value in their place",
        )
    return found


def _listed(row: Values, where: str) -> dict[Modality, list[Value]]:
    """Entries of ``videos``/``video``/``video_path`` and of Video-R1's ``path`` with ``data_type``,
    by kind."""
    entries: dict[Modality, list[Value]] = {}
    for kind in KINDS:
        names = (f"{kind}s", kind, f"{kind}_path")
        given = [row[key] for key in names if row.get(key) not in (None, "", [], {})]
        if kind == "video":
            _refuse_frames(given, where)
        entries[kind] = [
            entry for value in given for entry in (value if isinstance(value, list) else [value])
        ]
    kind_of_path = _data_type(row)
    if row.get("path") and kind_of_path is not None:
        entries[kind_of_path].append(row["path"])
    return entries


def _refuse_frames(given: list[Value], where: str) -> None:
    """A list of pictures is one video in its frames, never as many videos of a frame each."""
    for value in given:
        entries = value if isinstance(value, list) else [value]
        flat = [e for entry in entries for e in (entry if isinstance(entry, list) else [entry])]
        if any(isinstance(entry, str) and _PICTURE.search(entry) for entry in flat):
            raise InputError(
                where,
                f"video is given as a list of {len(flat)} frames",
                "frame lists are not read: make a video (ffmpeg -framerate FPS -i %04d.jpg "
                "OUT.mp4), or give them as images",
            )


def _spaced(tag: re.Match[str]) -> str:
    """A tag that is text of its own part, no place: it must not be taken for one."""
    return f"< {tag[0][1:-1]} >"


def _data_type(row: Values) -> Modality | None:
    folded = str(row.get("data_type")).strip().lower()
    return next((kind for kind in KINDS if kind == folded), None)


def _claim_path(row: Values, has_media: bool, where: str) -> None:
    """Raises InputError for a path that may be a medium and is of no kind: left out, the question
    would be blind. Beside other media and without a data_type it is any column."""
    if (
        row.get("path")
        and _data_type(row) is None
        and (row.get("data_type") is not None or not has_media)
    ):
        raise InputError(
            where,
            f"path with the data_type {row.get('data_type')!r}",
            f"set data_type to one of {', '.join(KINDS)} (data.reader.audio_in_video adds a "
            "video's sound), "
            "or drop path",
        )


def _content(
    content: Value, waiting: dict[Modality, list[Value]], config: DataConfig, where: str
) -> tuple[str, list[MediaItem]]:
    """Text of a message with its media places as tags, and the media in their order."""
    items: list[MediaItem] = []
    if isinstance(content, str):
        for tag in _TAG.finditer(content):
            kind: Modality = tag[1]  # type: ignore[assignment]
            items.append(media_item(_next(waiting, kind, where), kind, config, where))
        return content.strip(), items
    if not isinstance(content, list):
        raise InputError(
            where, f"message content is a {type(content).__name__}", "give text or a list of parts"
        )
    texts: list[str] = []
    for part in content:
        fields = part if isinstance(part, dict) else {}
        named = fields.get("type")
        medium = next((kind for kind in KINDS if kind == named), None)
        if named == "text":
            texts.append(_TAG_ONLY.sub(_spaced, str(fields.get("text") or "")))
        elif medium is not None:
            own: Values = {
                key: value
                for key, value in fields.items()
                if key not in ("type", "text") and value is not None
            }
            items.append(media_item(own or _next(waiting, medium, where), medium, config, where))
            texts.append(f"<{medium}>")
        else:
            raise InputError(
                where,
                f"content part of the type {named!r}",
                f"known are text, {', '.join(KINDS)}: "
                '{"type": "text", "text": ...}, {"type": "image", "image": PATH}',
            )
    return "\n".join(text.strip() for text in texts if text.strip()), items


def _next(waiting: dict[Modality, list[Value]], kind: Modality, where: str) -> Value:
    if not waiting[kind]:
        raise InputError(
            where,
            f"a {kind} place in the text without a file",
            f"add it to the row's {kind}s, or drop the tag",
        )
    return waiting[kind].pop(0)
