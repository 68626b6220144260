"""The rows of a fetched dataset in our own layout, beside their media."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from avatar_rl.cluster.hub.datasets import PublicDataset, RowFile
from avatar_rl.common.errors import InputError
from avatar_rl.common.files import json_line, replaced_file
from avatar_rl.common.text import shortened
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import RowReader
from avatar_rl.prompts.readers.rows import DatasetRow, iter_rows
from avatar_rl.prompts.record import MediaItem, Prompt


@dataclass
class Written:
    """What became of one file of rows."""

    path: Path
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # why, and how many for each reason
    without_media: int = 0  # rows that name a file that is not here
    example: str = ""  # such a file


def write_rows(dataset: PublicDataset, root: Path, *, required: bool = True) -> list[Written]:
    """One file of native rows for each file of published ones. Raises InputError where rows are
    ``required`` and no file of them is there."""
    found: list[Written] = []
    wanted = []
    for kind in dataset.rows:
        wanted.append(kind.pattern)
        for path in sorted(root.glob(kind.pattern)):
            if not path.name.startswith(".") and not path.name.endswith(".rows.jsonl"):
                found.append(_convert(dataset, kind, path, root))
    if required and wanted and not found:
        raise InputError(
            root,
            f"holds no {' and no '.join(wanted)}",
            "the dataset has another layout than at its first reading: give --revision, or convert "
            "its rows yourself (docs/data.md)",
        )
    return found


def _convert(dataset: PublicDataset, kind: RowFile, path: Path, root: Path) -> Written:
    written = Written(root / kind.out.format(stem=path.stem))
    # Pictures that are stored inside rows become files.
    config = DataConfig(extract_to=root / "media")
    with replaced_file(written.path) as beside, beside.open("wb") as file:
        for prompt in _prompts(dataset, config, path, written):
            placed = _placed(prompt, kind, root, written)
            row = placed.model_dump(mode="json", exclude_defaults=True)
            file.write(json_line({"media": {"items": []}} | row))
            written.rows += 1
    return written


def _prompts(
    dataset: PublicDataset, config: DataConfig, path: Path, written: Written
) -> Iterator[Prompt]:
    reader = RowReader(config)
    for row in iter_rows(path, config.split):
        try:
            yield reader.read(DatasetRow(row.where, row.number, dataset.adapt(row.data)))
        except InputError as error:
            written.left_out[shortened(error.what, 80)] += 1


def _placed(prompt: Prompt, kind: RowFile, root: Path, written: Written) -> Prompt:
    """``prompt`` with its media relative to ``root``, where they are there."""
    items = tuple(_found(item, kind, root) for item in prompt.media.items)
    absent = [item.uri for item in items if not (root / item.uri).is_file()]
    if absent:
        written.without_media += 1
        written.example = written.example or absent[0]
    return prompt.model_copy(update={"media": prompt.media.model_copy(update={"items": items})})


def _found(item: MediaItem, kind: RowFile, root: Path) -> MediaItem:
    path = Path(item.uri)
    if path.is_absolute():  # extracted from the row
        inside = path.is_relative_to(root)
        return item.model_copy(update={"uri": str(path.relative_to(root))}) if inside else item
    places = [Path(folder) / path for folder in kind.media]
    here = next((place for place in places if (root / place).is_file()), places[0])
    return item.model_copy(update={"uri": str(here)})
