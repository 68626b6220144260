"""Datasets as prompts: native JSONL, conversational, ms-swift and verl rows from .jsonl, .json,
.parquet or folders.

prompts = load_prompts(path, DataConfig())
index = PromptIndex(prompts)                 # id -> Prompt, in every worker
loader = MediaLoader(MediaConfig(), media_base(path, config))
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from avatar_rl.common.errors import DataError, InputError
from avatar_rl.prompts.config import DataConfig, DatasetFormat
from avatar_rl.prompts.readers import rows
from avatar_rl.prompts.readers.layouts import detect, read_row, without_absent
from avatar_rl.prompts.readers.rows import DatasetRow
from avatar_rl.prompts.record import Prompt, resolve_uri


def iter_rows(path: Path, config: DataConfig) -> Iterator[DatasetRow]:
    """Rows as they are stored, up to ``config.limit``; malformed ones raise only when their data is
    asked for."""
    return islice(rows.iter_rows(Path(path), config.split), config.limit)


class RowReader:
    """Reads rows of one dataset, each by its own layout; refuses an id that came before."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.layout: DatasetFormat = config.format
        self._seen: dict[str, str] = {}

    def read(self, row: DatasetRow) -> Prompt:
        """Raises InputError naming file:line and the remedy."""
        data = without_absent(row.data)
        layout = self.config.format
        if layout == "auto":
            layout = detect(row.data, row.where)
        if self.layout == "auto":
            self.layout = layout
        prompt = read_row(data, layout, self.config, row.where)
        before = self._seen.setdefault(prompt.id, row.where)
        if before != row.where:
            raise InputError(
                row.where, f"the id {prompt.id!r} is also that of {before}", "make ids unique"
            )
        return prompt


def iter_prompts(path: Path, config: DataConfig) -> Iterator[Prompt]:
    """Prompts in file order, streamed. Raises InputError at the first row that is wrong."""
    reader = RowReader(config)
    for row in iter_rows(path, config):
        yield reader.read(row)


def load_prompts(path: Path, config: DataConfig) -> list[Prompt]:
    """All prompts of a dataset. Raises InputError (a DataError) naming file:line and what to do."""
    return list(iter_prompts(path, config))


def media_base(path: Path, config: DataConfig) -> Path:
    """Folder that the dataset's relative media paths start from."""
    if config.media_root is not None:
        return config.media_root
    return path if path.is_dir() else path.parent


def anchored(prompt: Prompt, base: Path) -> Prompt:
    """The prompt with relative media paths made absolute, so that it means the same in every
    process.

    Raises InputError for remote media.
    """
    items = tuple(
        item.model_copy(update={"uri": str(resolve_uri(item.uri, base))})
        for item in prompt.media.items
    )
    return prompt.model_copy(update={"media": prompt.media.model_copy(update={"items": items})})


def _anchored_rows(path: Path, config: DataConfig) -> Iterator[Prompt]:
    base = media_base(path, config).resolve()
    reader = RowReader(config)
    for row in iter_rows(path, config):
        prompt = reader.read(row)
        try:
            yield anchored(prompt, base)
        except InputError as error:
            raise InputError(row.where, f"{error.where}: {error.what}", error.remedy) from error


class PromptIndex:
    """Prompts by id. Every worker builds its own; equal ``fingerprint`` means equal prompts."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts: dict[str, Prompt] = {}
        for prompt in prompts:
            if prompt.id in self._prompts:
                raise DataError(
                    f"prompt id {prompt.id!r} occurs twice; make ids unique across the datasets "
                    "of a run"
                )
            self._prompts[prompt.id] = prompt

    @classmethod
    def read(cls, paths: Iterable[Path], config: DataConfig) -> PromptIndex:
        """The prompts of several datasets, their media paths made absolute.

        Raises as ``load_prompts`` does, and for remote media.
        """
        return cls(prompt for path in paths for prompt in _anchored_rows(path, config))

    def __getitem__(self, prompt_id: str) -> Prompt:
        try:
            return self._prompts[prompt_id]
        except KeyError:
            raise DataError(
                f"no prompt with the id {prompt_id!r} among {len(self)}: this worker read another "
                "dataset than the one "
                "that asked; compare data.train, data.heldout, data.reader.limit and the "
                "fingerprints"
            ) from None

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self._prompts

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts.values())

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def ids(self) -> list[str]:
        """In dataset order."""
        return list(self._prompts)

    def fingerprint(self) -> str:
        """sha256 over all prompts in order, hex."""
        digest = hashlib.sha256()
        for prompt in self:
            digest.update(prompt.model_dump_json().encode() + b"\n")
        return digest.hexdigest()
