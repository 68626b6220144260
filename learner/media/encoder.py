"""Prompts as tokens and stored embeddings: a ``PromptEncoder`` whose media no longer have pixels.

Two kinds of entry: an embedding belongs to one medium, a layout to one prompt (tokens, positions,
and the names of its embeddings). A prompt whose entries are all there is neither decoded nor run
through the processor."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avatar_rl.common.errors import ModelError
from avatar_rl.prompts.embeddings.names import KINDS, PIXELS, content_name, embedding_name
from avatar_rl.prompts.embeddings.store import EmbeddingStore, Stored
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.encoding.embeddings import MediaEmbeddings
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.record import Modality, Prompt

if TYPE_CHECKING:
    from torch import nn

    from avatar_rl.learner.media.towers import Towers

_SOUND = ("input_features", "feature_attention_mask")


class StoredEncoder:
    """Encodes prompts with the embeddings of frozen towers. One per thread.

    ``revision`` names the towers' weights (``tower_revision``), their dtype and code; an entry of
    another revision is never found. ``towers`` is called when the first medium has to be computed.
    """

    def __init__(
        self,
        prompts: PromptEncoder,
        store: EmbeddingStore,
        revision: str,
        towers: Callable[[], Towers],
    ) -> None:
        self.prompts, self.store, self.revision = prompts, store, revision
        self._make_towers = towers
        self._towers: Towers | None = None
        self._cache: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._cached_bytes = 0

    def key(self, prompt: Prompt, hinted: bool) -> str:
        """Name of the prompt's layout. Raises DataError as ``PromptEncoder.text`` and
        ``MediaLoader.address`` do."""
        return self._of_prompt("layout", prompt, self.prompts.text(prompt, hinted))

    def media_name(self, prompt: Prompt) -> str:
        """Name of all media of the prompt together, with its hint or without."""
        return self._of_prompt("media", prompt)

    def _of_prompt(self, what: str, prompt: Prompt, *words: str) -> str:
        config = self.prompts.config
        loader = self.prompts.loader
        return content_name(
            what,
            self.revision,
            *words,
            str(prompt.media.audio_in_video),
            *(loader.address(item) for item in prompt.media.items),
            *(f"{item.kind} {item.min_pixels} {item.max_pixels}" for item in prompt.media.items),
            f"{config.min_pixels} {config.max_pixels} {config.total_video_tokens}",
        )

    def is_stored(self, key: str) -> bool:
        """Whether layout and embeddings are in the store, without reading these."""
        layout = self.store.get(key)
        names = _embedding_names(layout) if layout is not None else None
        return names is not None and all(
            self.store.has(name) for entries in names.values() for name in entries
        )

    def read(self, key: str, prompt: Prompt) -> EncodedPrompt | None:
        """The prompt from memory or from the store; None where anything of it is missing. Raises
        DataError when it has more than max_prompt_tokens tokens."""
        known = self._cache.get(key)
        if known is None:
            layout = self.store.get(key)
            known = self._read(layout) if layout is not None else None
        if known is None:
            return None
        self.prompts.check_length(prompt, len(known.input_ids))
        return self._kept(key, known)

    @property
    def modules(self) -> list[nn.Module]:
        """The towers, once they have been needed: they stay on their device."""
        return [] if self._towers is None else [self._towers.shell]

    def compute(self, key: str, prompt: Prompt, hinted: bool) -> EncodedPrompt:
        """Decode the prompt's media, run the towers on those that nobody stored yet, and store it
        all. Raises DataError as ``PromptEncoder.encode`` does."""
        encoded, settings = self.prompts.process(prompt, hinted)
        names: dict[Modality, list[str]] = {kind: [] for kind in KINDS}
        found: dict[Modality, list[Tensor]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            for number, item in enumerate(prompt.media.of(kind)):
                tensors = _of_medium(kind, number, encoded.features)
                name = self._embedding_name(
                    kind, self.prompts.loader.address(item), settings, tensors
                )
                found[kind].append(self._embedding(name, kind, tensors))
                names[kind].append(name)
        layout = {
            "input_ids": encoded.input_ids.to(torch.int32),
            "position_ids": encoded.position_ids.to(torch.int32).contiguous(),
        }
        notes = {"next_position": str(encoded.next_position), "embeddings": json.dumps(names)}
        self.store.put(key, layout, notes)
        media = self._placed(encoded.input_ids, found)
        return self._kept(key, replace(encoded, features={}, media=media))

    def _read(self, layout: Stored) -> EncodedPrompt | None:
        names = _embedding_names(layout)
        if names is None:
            return None
        found: dict[Modality, list[Tensor]] = {}
        for kind, entries in names.items():
            parts = [self.store.get(name) for name in entries]
            if any(part is None or "embeds" not in part.tensors for part in parts):
                return None
            found[kind] = [part.tensors["embeds"] for part in parts if part is not None]
        ids = layout.tensors["input_ids"].long()
        return EncodedPrompt(
            ids,
            layout.tensors["position_ids"].long(),
            int(layout.notes["next_position"]),
            digest=prompt_digest(ids),
            media=self._placed(ids, found),
        )

    def _placed(
        self, ids: Tensor, found: Mapping[Modality, Sequence[Tensor]]
    ) -> MediaEmbeddings | None:
        """Embeddings (N, 1 + D, H) of each medium at the placeholders of its kind, in their order.

        Raises ModelError where they are not equally many.
        """
        parts = []
        for kind, values in found.items():
            if not values:
                continue
            whole = values[0] if len(values) == 1 else torch.cat(list(values))
            token = getattr(self.prompts.positions.config, f"{kind}_token_id")
            places = torch.nonzero(ids == token)[:, 0]
            if len(places) != len(whole):
                raise ModelError(
                    f"a prompt has {len(places)} {kind} placeholders, but its media fill "
                    f"{len(whole)}: the processor and the model of this folder do not belong "
                    "together"
                )
            layers = whole[:, 1:].transpose(0, 1).contiguous()
            deep = (places, layers) if len(layers) else (None, None)
            parts.append(MediaEmbeddings(places, whole[:, 0].contiguous(), *deep))
        return MediaEmbeddings.merged(parts)

    def _embedding(self, name: str, kind: Modality, tensors: Mapping[str, Tensor]) -> Tensor:
        with self.store.claim(name):
            found = self.store.get(name)
            if found is not None and "embeds" in found.tensors:
                return found.tensors["embeds"]
            if self._towers is None:
                self._towers = self._make_towers()
            embeds = self._towers.embed(kind, tensors)
            self.store.put(name, {"embeds": embeds}, {"kind": kind})
        return embeds

    def _embedding_name(
        self,
        kind: Modality,
        address: str,
        settings: Mapping[str, object],
        tensors: Mapping[str, Tensor],
    ) -> str:
        """See ``embedding_name``; ``tensors`` are the processor's."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return embedding_name(self.revision, kind, address, settings, shapes)

    def _kept(self, key: str, encoded: EncodedPrompt) -> EncodedPrompt:
        """``encoded``, remembered up to ``data.template.cache_bytes``."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        limit = self.prompts.config.cache_bytes
        if encoded.nbytes <= limit:
            self._cache[key] = encoded
            self._cached_bytes += encoded.nbytes
            while self._cached_bytes > limit:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return encoded


def _embedding_names(layout: Stored) -> dict[Modality, list[str]] | None:
    """Names of a layout's embeddings by kind; None of what is no layout."""
    if not {"input_ids", "position_ids"} <= layout.tensors.keys():
        return None
    try:
        names = json.loads(layout.notes["embeddings"])
        return {kind: [str(name) for name in names[kind]] for kind in KINDS}
    except (KeyError, ValueError, TypeError):
        return None


def _of_medium(kind: Modality, number: int, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The processor's tensors of the prompt's ``number``-th medium of its kind."""
    if kind == "audio":
        return {name: features[name][number : number + 1] for name in _SOUND}
    values, grids = PIXELS[kind]
    sizes = features[grids].prod(-1).tolist()
    start = sum(sizes[:number])
    return {
        values: features[values][start : start + sizes[number]],
        grids: features[grids][number : number + 1],
    }
