"""Which files of a model folder are its checkpoint.

Folders hold more than one: Mistral's ``consolidated.safetensors``, a stale ``model.safetensors``,
adapters, optimiser states. Trainer, engine and export must take the same ones."""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from avatar_rl.common.errors import ModelError
from avatar_rl.common.stand_in import stand_in

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Weights that are no checkpoint of a model.
_OTHERS = re.compile(r"(adapter|optimizer|scheduler|ema|consolidated).*", re.IGNORECASE)
#: Of ``fingerprint``.
SAMPLES, SAMPLE_BYTES = 64, 1 << 14
_SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.safetensors")


class TensorHeader(NamedTuple):
    """A tensor of a checkpoint, as its file describes it."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, I64

    @property
    def floats(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a checkpoint by name, each with the file that holds it."""

    folder: Path
    tensors: dict[str, Path]

    @classmethod
    def find(cls, folder: Path) -> WeightFiles:
        """What the index says; without one ``model.safetensors``; else the other weight files.

        Raises ModelError for a folder without weights or with an adapter, a missing or damaged
        file, and for files without an index that do not make one checkpoint.
        """
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"model folder {folder} holds an adapter (adapter_config.json): merge it into its "
                "model (merge_and_unload, then save_pretrained), or remove the adapter's files; a "
                "folder with nothing but an adapter may be model.path"
            )
        if (folder / INDEX).is_file():
            return cls(folder, _of_index(folder))
        if (folder / SINGLE).is_file():
            return cls(folder, dict.fromkeys(_names(folder / SINGLE), folder / SINGLE))
        files = [f for f in sorted(folder.glob("*.safetensors")) if not _OTHERS.fullmatch(f.name)]
        if not files:
            raise ModelError(
                f"model folder {folder} has no *.safetensors file of a model: convert it with "
                "save_pretrained first"
            )
        return cls(folder, _of_files(folder, files))

    @property
    def files(self) -> list[Path]:
        """The checkpoint's files, sorted."""
        return sorted(set(self.tensors.values()))

    def by_file(self) -> dict[Path, list[str]]:
        """Names of the tensors that each file is read for."""
        found: dict[Path, list[str]] = {file: [] for file in self.files}
        for name, file in self.tensors.items():
            found[file].append(name)
        return found

    def headers(self) -> dict[str, TensorHeader]:
        """Shapes and types of all tensors; no values are read."""
        from safetensors import safe_open

        found: dict[str, TensorHeader] = {}
        for file, names in self.by_file().items():
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    header = tensors.get_slice(name)
                    found[name] = TensorHeader(tuple(header.get_shape()), header.get_dtype())
        return found


def loadable_folder(folder: Path) -> Path:
    """``folder``, or where loaders would take other files than ``WeightFiles``, a temporary folder
    of links that holds only the right ones. It is gone when the process ends.

    transformers prefers ``model.safetensors`` to an index; vLLM prefers ``consolidated*``. Raises
    ModelError as ``WeightFiles.find`` does.
    """
    found = WeightFiles.find(folder)
    files = found.files
    indexed = (folder / INDEX).is_file()
    strays = set(folder.glob("*.safetensors")) - set(files)
    if not strays and (indexed or files == [folder / SINGLE]):
        return folder
    view = Path(tempfile.mkdtemp(prefix="avatar-model-"))
    atexit.register(shutil.rmtree, view, ignore_errors=True)
    # params.json makes vLLM read the folder in Mistral's own format.
    hidden = {file.name for file in folder.glob("*.safetensors*")} | {"params.json"}
    for item in folder.iterdir():
        if item.name not in hidden:
            (view / item.name).symlink_to(item.resolve())
    for file in files:
        (view / file.name).symlink_to(file.resolve())
    weight_map = {name: file.name for name, file in found.tensors.items()}
    (view / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return view


def fingerprint(folder: Path) -> str:
    """sha256 over the checkpoint's names, shapes and types, and samples of its weight files.

    ``SAMPLES`` blocks of each file, evenly spread: training moves nearly every weight, so another
    model differs in them, and 15 GB are told apart in milliseconds. Raises ModelError as
    ``WeightFiles.find`` does.
    """
    digest = hashlib.sha256()
    for file in WeightFiles.find(folder).files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = stream.read(8)
            header += stream.read(int.from_bytes(header, "little"))
            digest.update(header)
            for number in range(SAMPLES):
                stream.seek(
                    len(header) + number * max(0, size - len(header) - SAMPLE_BYTES) // SAMPLES
                )
                digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _names(file: Path) -> set[str]:
    """Tensor names in a file, read from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:  # torch would have to be imported
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        if file.is_file() and (found := stand_in(file)) is not None:
            raise ModelError(f"weight file {file} {found[0]}: {found[1]}") from error
        raise ModelError(
            f"weight file {file} is cut short or damaged ({error}): copy it again from its source"
        ) from error


def _of_index(folder: Path) -> dict[str, Path]:
    file = folder / INDEX
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        tensors = {str(name): folder / Path(shard).name for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file} is no index of a checkpoint ({error!r}): copy it again, or remove it where "
            f"{SINGLE} holds all weights"
        ) from error
    for shard in sorted(set(tensors.values())):
        if not shard.is_file():
            raise ModelError(
                f"{file} names the shard {shard.name}, which is not there: copy it from the "
                "model's source"
            )
        absent = {name for name, place in tensors.items() if place == shard} - _names(shard)
        if absent:
            raise ModelError(
                f"{file} says that {shard.name} holds {min(absent)!r}, which it does not: index "
                "and shards are of different checkpoints; copy both again"
            )
    if not tensors:
        raise ModelError(f"{file} names no tensor: copy it again from the model's source")
    return tensors


def _of_files(folder: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Files without an index: one, or shards that complete one another."""
    files = list(files)
    shards = [_SHARD.fullmatch(file.name) for file in files]
    if len(files) > 1 or shards[0]:
        series = {(match[1], match[3]) if match else None for match in shards}
        if len(series) > 1 or None in series:
            raise ModelError(
                f"model folder {folder} has {', '.join(file.name for file in files)} and no "
                f"{INDEX} that says which of them count: restore the index, or remove the others"
            )
        numbers = {int(match[2]) for match in shards if match}
        [(stem, count)] = [part for part in series if part]
        for number in range(1, int(count) + 1):
            if number not in numbers:
                raise ModelError(
                    f"model folder {folder} lacks the shard {stem}{number:05d}-of-{count}"
                    ".safetensors: copy it from the model's source"
                )
    tensors: dict[str, Path] = {}
    for file in files:
        for name in sorted(_names(file)):
            if name in tensors:
                raise ModelError(
                    f"model folder {folder}: {file.name} and {tensors[name].name} both hold "
                    f"{name!r}, and no {INDEX} says which counts: restore it"
                )
            tensors[name] = file
    return tensors
