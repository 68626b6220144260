"""What a model's encoders make of a prompt's media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MediaEmbeddings:
    """What the encoders make of a prompt's media, in the place of its pixels and sounds.

    ``places`` count from the prompt's first token, in a pack from its first position."""

    places: Tensor  # (M,) int64, where the media placeholders are
    values: Tensor  # (M, H), the embeddings there
    #: Deepstack features of Qwen3 models: added to the states after each of the first D layers.
    visual_places: Tensor | None = None  # (K,) int64, ascending
    deepstack: Tensor | None = None  # (D, K, H)

    def moved(self, offset: int) -> MediaEmbeddings:
        """The same for a prompt that begins at position ``offset``."""
        visual = None if self.visual_places is None else self.visual_places + offset
        return replace(self, places=self.places + offset, visual_places=visual)

    def within(self, span: slice) -> MediaEmbeddings:
        """Those whose place is in ``span``, a range of positions."""

        def inside(places: Tensor) -> Tensor:
            return (places >= span.start) & (places < span.stop)

        kept = inside(self.places)
        visual, deep = self.visual_places, self.deepstack
        if visual is not None:
            seen = inside(visual)
            visual, deep = visual[seen], None if deep is None else deep[:, seen]
        return MediaEmbeddings(self.places[kept], self.values[kept], visual, deep)

    def to(self, device: torch.device) -> MediaEmbeddings:
        visual, deep = self.visual_places, self.deepstack
        return MediaEmbeddings(
            self.places.to(device),
            self.values.to(device),
            None if visual is None else visual.to(device),
            None if deep is None else deep.to(device),
        )

    @property
    def nbytes(self) -> int:
        tensors = (self.places, self.values, self.visual_places, self.deepstack)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @classmethod
    def merged(cls, parts: Sequence[MediaEmbeddings]) -> MediaEmbeddings | None:
        """All of a pack, None where there are none. Parts without deepstack features have no visual
        places."""
        if not parts:
            return None
        deep = [part for part in parts if part.deepstack is not None]
        visual = [part.visual_places for part in deep if part.visual_places is not None]
        features = [part.deepstack for part in deep if part.deepstack is not None]
        return cls(
            torch.cat([part.places for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat(visual) if visual else None,
            torch.cat(features, 1) if features else None,
        )
