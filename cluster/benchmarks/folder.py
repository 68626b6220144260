"""A downloaded set on disk: its rows, its media, and what is missing of them."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from avatar_rl.common.errors import InputError
from avatar_rl.common.files import replaced_file
from avatar_rl.prompts.readers.rows import Value, Values, iter_rows

_MAX_NAMED = 5  # missing files that an error names
_SUFFIX = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".wav", b"fLaC": ".flac"}


class SetRow:
    """One row; every access says what the row lacks."""

    def __init__(self, values: Values, where: str) -> None:
        self.values, self.where = values, where

    def get(self, *names: str) -> Value:
        """The first of ``names`` that the row has, else None."""
        found = (self.values.get(name) for name in names)
        return next((value for value in found if value is not None), None)

    def need(self, *names: str) -> Value:
        """Likewise. Raises InputError where the row has none of them."""
        value = self.get(*names)
        if value is None:
            raise InputError(
                self.where,
                f"no {' or '.join(map(repr, names))} (there is {', '.join(sorted(self.values))})",
                "is this the set's published file? (docs/evaluation.md)",
            )
        return value

    def text(self, *names: str) -> str:
        return str(self.need(*names)).strip()

    def texts(self, *names: str) -> list[str]:
        """A list of texts; a JSON object's values in the order of its keys."""
        value = self.need(*names)
        if isinstance(value, dict):
            value = [value[key] for key in sorted(value) if value[key] not in (None, "")]
        if not isinstance(value, list) or not value:
            raise InputError(self.where, f"{names[0]!r} is no list", "correct the row")
        return [str(entry).strip() for entry in value]


class SetFolder:
    """The folder ``root`` that a set was downloaded to. Pictures inside its rows are written to
    ``media``."""

    def __init__(self, root: Path, media: Path) -> None:
        self.root, self.media_folder = root, media
        self.missing: dict[Path, None] = {}  # media that rows name and that are not there
        self.at = str(root)  # where the row stands that was read last

    def rows(self, *patterns: str) -> Iterator[SetRow]:
        """The rows of all files of the first pattern that any file fits.

        Raises InputError naming the files that were wanted."""
        for path in self.files(*patterns):
            read = _tsv(path) if path.suffix == ".tsv" else _rows(path)
            for row in read:
                self.at = row.where
                yield row

    def files(self, *patterns: str) -> list[Path]:
        for pattern in patterns:
            if found := sorted(self.root.glob(pattern)):
                return found
        there = sorted(path.name for path in self.root.iterdir())[:8] if self.root.is_dir() else []
        raise InputError(
            self.root,
            f"holds no {' and no '.join(patterns)} ({', '.join(there) or 'it is empty or absent'})",
            "download the set to this folder, with its own file names "
            "(docs/evaluation.md lists them)",
        )

    def find(self, *candidates: str) -> Path:
        """The first of the relative paths that is a file; the first of all, noted as missing,
        where none is."""
        paths = [self.root / candidate for candidate in candidates]
        for path in paths:
            if path.is_file():
                return path
        self.missing[paths[0]] = None
        return paths[0]

    def embedded(self, value: Value, where: str) -> Path:
        """A picture or sound that is stored in the row itself, written to a file once.

        Takes what the ``datasets`` library stores ({"bytes", "path"}), bytes, base64 text and a
        path. Raises InputError for anything else."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            if len(value) < 1024 and (self.root / value).is_file():
                return self.root / value
            decoded = _from_base64(value)
            if decoded is None:
                return self.find(value) if len(value) < 1024 else _refuse(where)
            value = decoded
        if not isinstance(value, bytes) or not value:
            return _refuse(where)
        suffix = next((end for magic, end in _SUFFIX.items() if value.startswith(magic)), ".bin")
        path = self.media_folder / f"{hashlib.sha256(value).hexdigest()[:32]}{suffix}"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path) as beside:
                beside.write_bytes(value)
        return path

    def check_media(self, *, questions: int) -> None:
        """Raises InputError where media are missing, naming some of them."""
        if not self.missing:
            return
        names = ", ".join(str(path) for path in [*self.missing][:_MAX_NAMED])
        more = (
            f" and {len(self.missing) - _MAX_NAMED} more" if len(self.missing) > _MAX_NAMED else ""
        )
        raise InputError(
            self.root,
            f"{len(self.missing)} media files of {questions} questions are not there: "
            f"{names}{more}",
            "unpack the set's archives there, or leave their questions out with --skip-missing",
        )


def _rows(path: Path) -> Iterator[SetRow]:
    for row in iter_rows(path, "all"):
        yield SetRow(row.data, row.where)


def _tsv(path: Path) -> Iterator[SetRow]:
    """Rows of a table with a head, as VLMEvalKit's sets are published; an empty cell is absent."""
    csv.field_size_limit(1 << 30)  # a cell may hold a picture in base64
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t"), start=2):
            yield SetRow({key: value or None for key, value in row.items()}, f"{path}:{number}")


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", text), validate=True)
    except (binascii.Error, ValueError):
        return None


def _refuse(where: str) -> Path:
    raise InputError(
        where, "the picture or sound is neither bytes, base64 nor a path", "look at it"
    )


def seconds(value: Value, where: str) -> float:
    """Seconds of 12.5, "12.5", "01:30" or "1:02:03". Raises InputError for anything else."""
    try:
        total = 0.0
        for part in str(value).split(":"):
            total = 60 * total + float(part)
        return total
    except ValueError as error:
        raise InputError(where, f"{value!r} is no time", "give seconds or mm:ss") from error
