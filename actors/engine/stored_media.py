"""What the learner's store has of a prompt's media, held ready so that the engine runs no tower.

vLLM asks a connector of its encoder cache for every medium before it schedules a tower's run
(vllm_plugin/embeddings.py). What is here is taken, in the place of what the tower would give; what
is not is computed as ever."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from avatar_rl.actors.config import HELD_BYTES
from avatar_rl.actors.engine.prompt_cache import EngineInput, RenderedPrompt
from avatar_rl.prompts.embeddings.names import (
    KINDS,
    PIXELS,
    embedding_name,
    store_revision,
    tower_revision,
)
from avatar_rl.prompts.embeddings.store import EmbeddingStore, default_folder

if TYPE_CHECKING:
    from avatar_rl.prompts.media.loader import MediaLoader
    from avatar_rl.prompts.record import Prompt

#: Names of media that are remembered: of each vLLM's hash and the store's name, 130 bytes.
MOST_NAMES = 1 << 18


class StoredMedia:
    """Embeddings by vLLM's hash of their medium. The feeder's thread calls ``note`` and ``fetch``,
    the engine's ``get``."""

    def __init__(self, store: EmbeddingStore, revision: str) -> None:
        self.store, self.revision = store, revision
        self.taken = 0  # media that the engine took in the place of a tower's run
        self._lock = threading.Lock()
        self._names: OrderedDict[str, str] = OrderedDict()  # by hash
        self._held: OrderedDict[str, Tensor] = OrderedDict()  # (N, (1 + D) H) by hash
        self._bytes = 0

    @classmethod
    def open(cls, model: Path, folder: Path | None, limit: int, dtype: str) -> StoredMedia:
        """Of the towers of ``model`` in ``dtype``: reads all their weights, about 1 s per GB. The
        store in ``folder``, or in the node's own, has at most ``limit`` bytes."""
        revision = store_revision(model, dtype, tower_revision(model))
        return cls(EmbeddingStore(folder or default_folder(), limit), revision)

    def note(self, names: Mapping[str, str]) -> None:
        """Under which names the store has media, by hash (``stored_names``)."""
        for known, name in names.items():
            self._names[known] = name
            self._names.move_to_end(known)
        while len(self._names) > MOST_NAMES:
            self._names.popitem(last=False)

    def note_prompt(
        self,
        loader: MediaLoader,
        prompt: Prompt,
        engine_input: EngineInput,
        rendered: RenderedPrompt,
    ) -> None:
        """``note`` of a prompt that this process has prepared."""
        self.note(stored_names(self.revision, loader, prompt, engine_input, rendered))

    def fetch(self, rendered: RenderedPrompt) -> None:
        """Hold ready what the store has of the prompt's media."""
        if rendered["type"] != "multimodal":
            return
        for kind, hashes in rendered["mm_hashes"].items():
            places = rendered["mm_placeholders"][kind]
            for known, place in zip(hashes, places, strict=True):
                self._fetch(known, place.get_num_embeds())

    def get(self, known: str) -> Tensor | None:
        """(N, (1 + D) H) of a medium: what its tower gives, and behind each its deepstack features;
        None where it is not held."""
        with self._lock:
            return self._held.get(known)

    def withdraw(self) -> None:
        """The engine of this process ends, and takes nothing any more."""
        from avatar_rl.actors.engine.vllm_plugin import embeddings

        embeddings.withdraw()

    def _fetch(self, known: str, count: int) -> None:
        with self._lock:
            if known in self._held:
                self._held.move_to_end(known)
                return
        name = self._names.get(known)
        entry = None if name is None else self.store.get(name)
        embeds = None if entry is None else entry.tensors.get("embeds")
        if embeds is None or len(embeds) != count:
            return
        flat = embeds.flatten(1)
        with self._lock:
            self._held[known] = flat
            self._bytes += flat.nbytes
            while self._bytes > HELD_BYTES:
                self._bytes -= self._held.popitem(last=False)[1].nbytes


def stored_names(
    revision: str,
    loader: MediaLoader,
    prompt: Prompt,
    engine_input: EngineInput,
    rendered: RenderedPrompt,
) -> dict[str, str]:
    """Names in the store of the prompt's media, by vLLM's hash of each."""
    if rendered["type"] != "multimodal":
        return {}
    found: dict[str, str] = {}
    settings = engine_input.get("mm_processor_kwargs") or {}
    for kind in KINDS:
        hashes = rendered["mm_hashes"].get(kind, [])
        items = rendered["mm_kwargs"].get(kind, [])
        for known, values, item in zip(hashes, items, prompt.media.of(kind), strict=True):
            shapes = _shapes(kind, cast("Mapping[str, Any]", values))
            address = loader.address(item)
            found[known] = embedding_name(revision, kind, address, settings, shapes)
    return found


def _shapes(kind: str, item: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of a picture's or clip's tensors as transformers' processor has them."""
    if kind not in PIXELS:
        return {}
    values, grid = PIXELS[kind]
    return {values: list(item[values].data.shape), grid: [1, item[grid].data.numel()]}
