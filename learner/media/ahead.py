"""The rank's own encoder, and the thread that tells its workers which prompts come next."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from avatar_rl.common.errors import AvatarError
from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.workers import MediaWorkers
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.workers.pool import WorkerGoneError

if TYPE_CHECKING:
    from torch import nn

    from avatar_rl.buffer_service.records.requests import RolloutRequest
    from avatar_rl.prompts.datasets import PromptIndex

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks at the rollout requests
ATTEMPTS = 3  # times that an entry may vanish, or a worker die, before the rank does it itself


class MediaSeconds(NamedTuple):
    """Seconds since the last ask, and prompts with media by where they came from."""

    busy: float  # that workers, or the rank in their place, spent on media
    waited: float  # that the rank waited for them
    hits: int  # prompts that were there
    misses: int


class AheadEncoder:
    """A ``PromptEncoder`` with embeddings for pixels: from the store, else from a worker process.

    Without workers the rank computes what is missing itself. Not safe for concurrent use, but for
    ``ahead``.
    """

    def __init__(self, stored: StoredEncoder, workers: MediaWorkers | None) -> None:
        self.prompts: PromptEncoder = stored.prompts
        self._stored, self._workers = stored, workers
        self._own_s = self._waited_s = self._told_busy_s = 0.0
        self._hits = self._misses = 0

    @property
    def tokenizer(self) -> Any:  # as untyped as that of ``PromptEncoder``
        return self.prompts.tokenizer

    @property
    def warnings(self) -> list[str]:
        return self.prompts.warnings

    def text(self, prompt: Prompt, hinted: bool) -> str:
        """See ``PromptEncoder.text``."""
        return self.prompts.text(prompt, hinted)

    @property
    def modules(self) -> list[nn.Module]:
        """What the rank itself holds on its device; workers hold their own."""
        return self._stored.modules

    def encode(self, prompt: Prompt, hinted: bool) -> EncodedPrompt:
        """See ``PromptEncoder.encode``; its features are embeddings, (N, 1 + D, H) each."""
        if not prompt.media.items:
            return self.prompts.encode(prompt, hinted)
        key = self._stored.key(prompt, hinted)
        found = self._stored.read(key, prompt)
        if found is not None:
            self._hits += 1
            return found
        self._misses += 1
        start = time.perf_counter()
        try:
            return self._from_worker(key, prompt, hinted) or self._own(key, prompt, hinted)
        finally:
            self._waited_s += time.perf_counter() - start

    def ahead(self, prompts: Iterable[tuple[Prompt, bool]]) -> None:
        """Prompts, each with or without its hint, that will be asked for: workers begin now."""
        if self._workers is None or not self._workers.alive:
            return
        for prompt, hinted in prompts:
            if prompt.media.items:
                self._workers.ask(prompt, hinted)

    def seconds(self) -> MediaSeconds:
        """What media took since the last call."""
        busy = self._own_s + (self._workers.busy_s if self._workers is not None else 0.0)
        found = MediaSeconds(busy - self._told_busy_s, self._waited_s, self._hits, self._misses)
        self._told_busy_s, self._waited_s, self._hits, self._misses = busy, 0.0, 0, 0
        return found

    def metrics(self) -> dict[str, float]:
        """``seconds`` as metrics of a step; none of a step without media."""
        busy, waited, hits, misses = self.seconds()
        found = {}
        if hits + misses:
            found["media/store_hit_share"] = hits / (hits + misses)
        if busy:
            found |= {"time/media": busy, "media/hidden_share": max(0.0, 1 - waited / busy)}
        return found

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def _from_worker(self, key: str, prompt: Prompt, hinted: bool) -> EncodedPrompt | None:
        """None where no worker can: they died, or what they store is evicted at once."""
        for _ in range(ATTEMPTS):
            if self._workers is None or not self._workers.alive:
                return None
            try:
                made = self._workers.ask(prompt, hinted, first=True).result()
            except WorkerGoneError:
                log.warning("a media worker died (of too little memory?): it is replaced")
                continue
            except AvatarError:
                raise
            except Exception as error:
                # Of its memory or its device: the rank tries by itself, and fails by name.
                log.warning("a media worker failed at prompt %s: %r", prompt.id, error)
                return None
            found = made or self._stored.read(key, prompt)
            if found is not None:
                return found
        return None

    def _own(self, key: str, prompt: Prompt, hinted: bool) -> EncodedPrompt:
        start = time.perf_counter()
        encoded = self._stored.compute(key, prompt, hinted)
        self._own_s += time.perf_counter() - start
        return encoded


class Lookahead:
    """A thread that hands the prompts of coming steps to the workers.

    ``outstanding`` gives the rollout requests that wait or are worked on: their prompts are trained
    on in the next steps. Of the ranks of a node, each takes its ``share`` (number, count).
    """

    def __init__(
        self,
        outstanding: Callable[[], Sequence[RolloutRequest]],
        prompts: PromptIndex,
        encoder: AheadEncoder,
        share: tuple[int, int],
    ) -> None:
        self._outstanding, self._prompts, self._encoder = outstanding, prompts, encoder
        self._number, self._count = share
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="media-ahead", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> int:
        """Hand over what is new; returns how many prompts that were."""
        requests = [r for r in self._outstanding() if r.kind == "train"]
        new = [r for r in sorted(requests, key=lambda r: r.seq) if r.key not in self._seen]
        self._seen = {r.key for r in requests}
        ids = dict.fromkeys(r.prompt_id for r in new if self._is_mine(r.prompt_id))
        prompts = [self._prompts[name] for name in ids if name in self._prompts]
        self._encoder.ahead((prompt, False) for prompt in prompts)
        # Whether a prompt is shown its hint is known only once it is leased.
        self._encoder.ahead((prompt, True) for prompt in prompts if prompt.hint)
        return len(prompts)

    def _is_mine(self, prompt_id: str) -> bool:
        return zlib.crc32(prompt_id.encode()) % self._count == self._number

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self.look()
            except AvatarError as error:
                # An aid: the step asks for its prompts itself, and the buffer's troubles are told
                # by those who need it.
                log.info("no look ahead at coming prompts: %s", error)
