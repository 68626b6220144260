"""Prompts with their pixels from the store: for towers that train, whose embeddings change.

What can be done ahead of the step is decoding and the processor. As with embeddings a medium that a
prompt shows with and without its hint is stored once, and the ranks of a node share the store."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.prompts.embeddings.store import EmbeddingStore, Stored
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder

if TYPE_CHECKING:
    from avatar_rl.learner.media.towers import Towers
    from avatar_rl.prompts.record import Prompt

_PIXELS = "pixels"


def _no_towers() -> Towers:
    raise ModelError("stored pixels need no towers")


class StoredPixels(StoredEncoder):
    """Encodes prompts as ``PromptEncoder`` does, its media tensors read from the store.

    ``revision`` names the processor and the code; no weights are in it."""

    def __init__(self, prompts: PromptEncoder, store: EmbeddingStore, revision: str) -> None:
        super().__init__(prompts, store, f"{_PIXELS} {revision}", _no_towers)

    def is_stored(self, key: str) -> bool:
        layout = self.store.get(key)
        return layout is not None and self.store.has(layout.notes.get(_PIXELS, ""))

    def compute(self, key: str, prompt: Prompt, hinted: bool) -> EncodedPrompt:
        """Decode and process the prompt's media, and store it all. Raises DataError as
        ``PromptEncoder.encode`` does."""
        encoded, _ = self.prompts.process(prompt, hinted)
        name = self.media_name(prompt)
        if not self.store.has(name):
            self.store.put(name, encoded.features, {})
        layout = {"input_ids": encoded.input_ids, "position_ids": encoded.position_ids}
        notes = {"next_position": str(encoded.next_position), _PIXELS: name}
        self.store.put(key, layout, notes)
        return self._kept(key, encoded)

    def _read(self, layout: Stored) -> EncodedPrompt | None:
        if not {"input_ids", "position_ids"} <= layout.tensors.keys():
            return None
        media = self.store.get(layout.notes.get(_PIXELS, ""))
        if media is None:
            return None
        ids = layout.tensors["input_ids"]
        return replace(
            EncodedPrompt(ids, layout.tensors["position_ids"], int(layout.notes["next_position"])),
            features=media.tensors,
            digest=prompt_digest(ids),
        )
