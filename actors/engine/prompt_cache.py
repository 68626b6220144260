"""Prompts as vLLM takes them, media preprocessed, kept for their next visit: pool prompts recur
every few steps."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakValueDictionary

from torch import Tensor

if TYPE_CHECKING:
    from vllm.inputs import MultiModalInput, TokensInput
    from vllm.multimodal.inputs import MultiModalKwargsItem

#: What ``PromptEncoder.engine_input`` gives; a prompt for vLLM's renderer.
EngineInput: TypeAlias = Mapping[str, Any]
#: What vLLM's renderer makes of it: token ids with placeholders expanded, media preprocessed.
RenderedPrompt: TypeAlias = "TokensInput | MultiModalInput"


class PromptCache:
    """Bounded in bytes, the least recently used leaves first; thread-safe.

    Holds processor output only, which no weight update makes stale. Media of equal ids are kept
    once (a prompt, and the same with its hint), though each prompt is counted in full.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[RenderedPrompt, int]] = OrderedDict()
        # media by kind and id
        self._items: WeakValueDictionary[tuple[str, str], MultiModalKwargsItem] = (
            WeakValueDictionary()
        )

    def key(self, engine_input: EngineInput) -> str | None:
        """Equal for prompts that preprocess alike; None when that cannot be told (media without
        ids)."""
        if engine_input.get("multi_modal_data") and not engine_input.get("multi_modal_uuids"):
            return None
        parts = ("prompt", "prompt_token_ids", "multi_modal_uuids", "mm_processor_kwargs")
        return json.dumps([engine_input.get(part) for part in parts], sort_keys=True)

    def get(self, key: Hashable | None) -> RenderedPrompt | None:
        """What was put under ``key``; None when it was not, has been dropped, or has no key."""
        with self._lock:
            if key is None or key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable | None, rendered: RenderedPrompt) -> None:
        """Keep ``rendered``, unless it has no key or is larger than the whole cache."""
        if key is None:
            return
        tensors = _tensors(rendered.get("mm_kwargs"))
        size = sum(tensor.nbytes for tensor in tensors) + 1024  # and the token ids
        if size > self.capacity:
            return
        with self._lock:
            if key in self._entries:
                return
            self._share(rendered)
            self._entries[key] = (rendered, size)
            self.used += size
            while self.used > self.capacity:
                self.used -= self._entries.popitem(last=False)[1][1]

    def _share(self, rendered: RenderedPrompt) -> None:
        """Equal ids mean equal processor output (``PromptEncoder.engine_input``)."""
        if rendered["type"] != "multimodal":
            return
        media = rendered["mm_kwargs"]
        for kind, names in rendered["mm_hashes"].items():
            # An item is None only where vLLM's own cache has it, which is off.
            items = cast("list[MultiModalKwargsItem]", media[kind])
            media[kind] = [
                self._items.setdefault((kind, name), item)
                for name, item in zip(names, items, strict=True)
            ]


def _tensors(value: object) -> Iterator[Tensor]:
    """Tensors anywhere in vLLM's nested keyword items."""
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "data") and isinstance(value.data, Tensor):  # MultiModalFieldElem
        yield value.data
    elif hasattr(value, "values"):  # kwargs by modality, an item's fields
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
