"""A judge's prompt of one's own: a text file with placeholders (docs/method.md 1.5)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import Json
from avatar_rl.rewards.judges.base import CRITERIA

#: What a template may ask for. The last two are the completion's.
PLACEHOLDERS = ("question", "true_answer", "options", "heard", "scene", "reasoning", "answer")
_OF_THE_COMPLETION = ("reasoning", "answer")
# A word in braces. Other braces, such as those of a JSON example, stay as they are.
_NAMED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
LONGEST = 100_000  # characters of a template


@dataclass(frozen=True)
class JudgeTemplate:
    """The text and its placeholders. Without any it is instructions: the material follows as JSON,
    as it does behind our own."""

    text: str
    names: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file. Raises ConfigError for one that is missing or no text, names an
        unknown placeholder, shows nothing of the completion, or asks for other scores."""
        where = f"rewards.judge.prompt {path}"
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read: {error}") from error
        if not text or len(text) > LONGEST:
            raise ConfigError(f"{where} has {len(text)} characters: needs 1 to {LONGEST}")
        names = frozenset(_NAMED.findall(text))
        if unknown := sorted(names - set(PLACEHOLDERS)):
            raise ConfigError(
                f"{where} has the placeholder {{{unknown[0]}}}: known are "
                f"{', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}"
            )
        if names and (unseen := [name for name in _OF_THE_COMPLETION if name not in names]):
            raise ConfigError(
                f"{where} has placeholders, but not {{{unseen[0]}}}: the judge would not see it; "
                "write it in, or use none and the material follows as JSON"
            )
        if missing := [key for key in CRITERIA if key not in text]:
            raise ConfigError(
                f"{where} does not ask for {missing[0]}: a reply without it scores 0 there; name "
                f"all of {', '.join(CRITERIA)}"
            )
        return cls(text, names)

    def fill(self, values: Mapping[str, Json]) -> str:
        """The text with each placeholder as JSON, in quotes: what a completion writes cannot leave
        them, and its own braces stand for nothing."""
        return _NAMED.sub(lambda found: json.dumps(values[found[1]], ensure_ascii=True), self.text)
