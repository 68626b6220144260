"""Rows of a dataset file or folder as dicts, one at a time, each knowing where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from avatar_rl.common.errors import InputError
from avatar_rl.common.stand_in import stand_in

_BATCH_ROWS = 256
#: An escape that can be half of a character of UTF-16.
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_LAYOUTS = ".jsonl, .json (an array), .parquet, a folder of these, or a folder saved by `datasets`"


#: What a column may hold: JSON, and bytes in parquet.
Value: TypeAlias = "bool | int | float | str | bytes | list[Value] | dict[str, Value] | None"
Values: TypeAlias = dict[str, Value]


@dataclass(frozen=True)
class DatasetRow:
    """One row; ``content`` is what is wrong with it where it could not be read."""

    where: str  # "file:line", or "file:row" where rows are not lines
    number: int  # 1-based line or row
    content: Values | InputError

    @property
    def data(self) -> Values:
        """The row's values. Raises the InputError of a malformed row."""
        if isinstance(self.content, InputError):
            raise self.content
        return self.content


def iter_rows(path: Path, split: str) -> Iterator[DatasetRow]:
    """Rows of ``path`` in file order, streamed.

    Raises InputError when the path is missing, empty or of an unknown layout; a malformed line only
    makes that row's ``data`` raise."""
    if not path.exists():
        raise InputError(
            path, "no such dataset", "correct the path, or write one with `avatar data synthesize`"
        )
    empty = True
    try:
        for row in _folder(path, split) if path.is_dir() else _file(path):
            empty = False
            yield row
    except OSError as error:
        raise InputError(
            error.filename or path,
            f"cannot be read ({error.strerror or error})",
            "check the disk and the file's permissions, or copy it again",
        ) from error
    if empty:
        raise InputError(path, "the dataset has no rows", "choose another file or split")


def _file(path: Path) -> Iterator[DatasetRow]:
    reader = _READERS.get(path.suffix)
    found = stand_in(path)
    if found is not None:
        raise InputError(path, *found)
    if reader is None:
        raise InputError(path, f"unknown dataset type {path.suffix!r}", f"give {_LAYOUTS}")
    return reader(path)


def _jsonl(path: Path) -> Iterator[DatasetRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield DatasetRow(where, number, _parsed(line, where))


def _parsed(line: bytes, where: str) -> Values | InputError:
    remedy = "each line must be one JSON object: mend or remove the line"
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        return InputError(
            where, f"not UTF-8 at byte {error.start + 1} of the line", "save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return InputError(where, f"malformed JSON at column {error.colno}: {error.msg}", remedy)
    except (
        RecursionError,
        ValueError,
    ) as error:  # nested too deeply, or a number with too many digits
        return InputError(where, f"JSON that cannot be read ({error})", remedy)
    if not isinstance(value, dict):
        return InputError(where, f"holds {type(value).__name__}, not an object", remedy)
    return _whole(value, where) if _HALF.search(line) else value


def _whole(value: Values, where: str) -> Values | InputError:
    """``value``, or what is wrong with it: JSON can hold halves of characters, which no file and no
    model can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        return InputError(
            where, f"holds half of a character ({half})", "write the text anew, or drop the row"
        )
    return value


def _once(pairs: list[tuple[str, Value]]) -> Values:
    """An object of JSON. Raises ValueError for a key that is there twice: one of its values would
    be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _json_array(path: Path) -> Iterator[DatasetRow]:
    """Objects of a JSON array, decoded one after the other: only the text is held as a whole."""
    remedy = "the file must be one JSON array of objects: mend it, or convert it to JSON Lines"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            path, f"not UTF-8 at byte {error.start + 1}", "save the file as UTF-8"
        ) from error
    halves = _HALF.search(text.encode()) is not None
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    line, counted = 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    at = skip(0)
    if at == len(text):
        return
    if text[at] != "[":
        raise InputError(f"{path}:1", f"starts with {text[at]!r}, not '['", remedy)
    at = skip(at + 1)
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            value, at = decoder.raw_decode(text, at)
        except (RecursionError, ValueError) as error:  # as in _parsed
            place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else where
            why = (
                f" at column {error.colno}: {error.msg}"
                if isinstance(error, json.JSONDecodeError)
                else f" ({error})"
            )
            raise InputError(place, f"malformed JSON{why}", remedy) from error
        if isinstance(value, dict):
            yield DatasetRow(where, line, _whole(value, where) if halves else value)
        else:
            wrong = InputError(where, f"holds {type(value).__name__}, not an object", remedy)
            yield DatasetRow(where, line, wrong)
        at = skip(at)
        if at < len(text) and text[at] == ",":
            at = skip(at + 1)
        elif at < len(text) and text[at] != "]":
            break
    if at >= len(text) or text[at] != "]":
        raise InputError(f"{path}:{line}", "the JSON array ends or breaks after this row", remedy)
    if skip(at + 1) < len(text):
        raise InputError(f"{path}:{line}", "more text follows behind the JSON array", remedy)


def _parquet(path: Path) -> Iterator[DatasetRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(
                    path, f"has the column {twice[0]!r} twice", "rename or drop one of them"
                )
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield DatasetRow(f"{path}:{number}", number, value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"not a readable parquet file ({error})", "copy it again") from error


_READERS: dict[str, Callable[[Path], Iterator[DatasetRow]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_array,
    ".parquet": _parquet,
}


def _folder(path: Path, split: str) -> Iterator[DatasetRow]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _saved_dataset(path, split)
        return
    for suffix in (".parquet", ".jsonl", ".json"):
        files = sorted(
            file
            for file in path.rglob(f"*{suffix}")
            if file.is_file()
            and file.name not in ("dataset_info.json", "dataset_infos.json")
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if files:
            named = [file for file in files if file.name.startswith(split)]
            for file in named or files:
                yield from _file(file)
            return
    raise InputError(path, "holds no dataset files", f"give {_LAYOUTS}")


def _saved_dataset(path: Path, split: str) -> Iterator[DatasetRow]:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, LookupError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise InputError(
            path,
            f"is no whole folder of `datasets` ({type(error).__name__}: {error})",
            "copy it again, or save it anew (save_to_disk)",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise InputError(
                path, f"has no split {split!r}", f"set data.reader.split to one of {sorted(loaded)}"
            )
        loaded = loaded[split]
    number = 0
    # as Arrow tables: media columns stay paths or bytes instead of being decoded
    for table in loaded.with_format("arrow").iter(_BATCH_ROWS):
        for value in table.to_pylist():
            number += 1
            yield DatasetRow(f"{path}:{number}", number, value)
