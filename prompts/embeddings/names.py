"""What an entry of the embedding store is called: everything that its values depend on.

The learner's encoder and the rollout engine name media alike, so one finds what the other made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avatar_rl.common.weight_files import WeightFiles
from avatar_rl.prompts.record import Modality

if TYPE_CHECKING:  # the driver names towers, and does without torch
    from torch import Tensor

#: Raise it when towers or layouts are stored in another way.
VERSION = 1
KINDS: tuple[Modality, ...] = ("image", "video", "audio")
#: The processor's tensors of each kind of picture: those cut by medium, and the one that says
#: where.
PIXELS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
#: Words of a parameter's name that say it belongs to a tower.
TOWERS = ("visual", "audio_tower")


def tower_suffix(name: str) -> str | None:
    """A tensor's name from its tower on; None for one of the language model."""
    parts = name.split(".")
    return next(
        (".".join(parts[place:]) for place, part in enumerate(parts) if part in TOWERS), None
    )


def tower_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name from the tower on, tensor) of a checkpoint's towers, in the order of their names."""
    from safetensors import safe_open

    found: dict[str, tuple[str, Path]] = {}
    for name, file in WeightFiles.find(folder).tensors.items():
        suffix = tower_suffix(name)
        # An omni checkpoint also holds a talker and a vocoder.
        if suffix is not None and not name.startswith(("talker.", "token2wav.", "code2wav.")):
            found[suffix] = (name, file)
    for suffix in sorted(found):
        name, file = found[suffix]
        with safe_open(file, framework="pt") as tensors:
            yield suffix, tensors.get_tensor(name)


def tower_revision(folder: Path) -> str:
    """sha256 of the towers' weights, names and types; empty where a checkpoint has no tower. Reads
    all their bytes, about 1 s per GB."""
    import torch

    digest, towers = hashlib.sha256(), 0
    for name, tensor in tower_tensors(folder):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(values)  # type: ignore[arg-type]  # an array is a buffer
        towers += 1
    return digest.hexdigest() if towers else ""


def revision_of(words: Iterable[str]) -> str:
    """One name for towers and all that their embeddings depend on."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def store_revision(folder: Path, dtype: str, towers: str) -> str:
    """Of the embeddings that ``folder``'s towers give in ``dtype``; ``towers`` is their
    ``tower_revision``, empty where only pixels are kept."""
    return revision_of([towers, *processing_words(folder, dtype)])


def embedding_name(
    revision: str,
    kind: Modality,
    address: str,
    settings: Mapping[str, object],
    shapes: Mapping[str, Sequence[int]],
) -> str:
    """Of one medium: its content (``MediaLoader.address``), how it was decoded and processed, and
    the towers. ``shapes`` are those of the processor's tensors of it alone."""
    # Sound is padded to the longest of its prompt, which changes nothing of what is heard.
    pixels = {name: list(shape) for name, shape in sorted(shapes.items())}
    said = json.dumps(
        [settings.get(f"{kind}s_kwargs"), pixels if kind != "audio" else {}], sort_keys=True
    )
    return content_name("embedding", revision, kind, address, said)


def processing_words(folder: Path, dtype: str) -> list[str]:
    """What else an embedding depends on: dtype, the model's configs, transformers' version."""
    import transformers

    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.jinja"))]
    skipped = ("index.json", "generation_config.json")
    return [
        f"version {VERSION}",
        dtype,
        transformers.__version__,
        *(
            f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"
            for file in files
            if not file.name.endswith(skipped)
        ),
    ]


def content_name(*parts: str) -> str:
    """Content address; every part's length goes in, which keeps ("ab", "c") and ("a", "bc")
    apart."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(np.int64(len(data)).tobytes() + data)
    return digest.hexdigest()
