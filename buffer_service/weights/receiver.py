"""Weights in: fetched from the weight store, verified, and checked before they touch a running
engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.block import unpack_weights
from avatar_rl.buffer_service.weights.store import MessageRef, WeightMessage
from avatar_rl.common.errors import ModelError
from avatar_rl.common.weight_files import WeightFiles

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

WAIT_S = 0.2  # longest wait for a new version before the caller is asked whether to continue
ASK_S = 1.0  # between questions to the weight store while what it offered does not come
GONE_S = 0.05  # until the weight store knows of a death, too
#: From a version's publication to its commit; far less than a learner needs to restart.
COMMIT_S = 5.0
COMMIT_POLL_S = 0.02
RETRY_S = 0.5  # after a version that cannot be used; it may be published again
MAX_REFUSED = 3  # in a row
#: Parts of a published checkpoint that no text comes from, so they are never updated: those of
#: omni models that speak, and the heads that draft several tokens at once.
UNUSED = ("talker.", "token2wav.", "code2wav.", "mtp.")
#: Tables that old checkpoints hold and every loader computes anew.
COMPUTED = (".rotary_emb.inv_freq",)


class WeightReceiver:
    """Fetches published versions for one engine and verifies them. ``refused`` counts those that
    were damaged."""

    def __init__(self, weight_store: ActorHandle, version: int) -> None:
        self.weight_store, self.version = weight_store, version
        self.refused = self.committed = 0
        self._in_a_row = 0
        self._offered: MessageRef | None = None  # by the weight store, and not there yet
        self._asked = 0.0

    def updates(
        self, buffer: ReplayBuffer, running: Callable[[], bool]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Committed versions and their verified tensors; ends once ``running`` is false.

        A version is fetched and verified while its commit is still to come.
        """
        while running():
            if (update := self.next_update(buffer, running)) is not None:
                yield update
                del update  # or the store would hold it until the next one has come

    def next_update(
        self, buffer: ReplayBuffer, running: Callable[[], bool]
    ) -> tuple[int, dict[str, Tensor]] | None:
        """The next committed version, waited for a moment; None where there is none yet."""
        before = self.version
        update = self.fetch(buffer)
        if update is None:
            return None
        if self.committed >= update[0] or is_committed(buffer, update[0], running):
            return update
        self.version = before  # ask again: another learner may publish it again
        return None

    def fetch(self, buffer: ReplayBuffer | None = None) -> tuple[int, dict[str, Tensor]] | None:
        """The next version, waited for up to ``WAIT_S``, and its verified tensors: views of the
        object store.

        It need not be committed yet; ``buffer`` is asked meanwhile what is (``committed``). None
        when there is none, or when it is damaged or lost with its node. Then the next call asks for
        it again, since a restarted learner publishes it again.

        Raises ModelError when ``MAX_REFUSED`` attempts in a row found nothing usable.
        """
        import ray

        try:
            message = self._await()
            if message is None:
                return None
            version = message.version
            if version <= self.version:  # offered again to a weight store that had lost it
                return None
            weights: dict[str, Tensor] = {}

            def verify() -> None:
                weights.update(unpack_weights(message))

            if buffer is None:
                verify()
            else:
                self.committed = buffer.replay.version(meanwhile=verify)
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.RayTaskError,
            ray.exceptions.OwnerDiedError,
        ):
            time.sleep(GONE_S)  # the learner or the weight store died before it was there
            return None
        except (ModelError, ray.exceptions.ObjectLostError) as error:
            self.refused += 1
            self._in_a_row += 1
            log.warning("a version was refused, the engine stays at %d: %s", self.version, error)
            if self._in_a_row >= MAX_REFUSED:
                raise ModelError(
                    f"the version after {self.version} cannot be adopted after {MAX_REFUSED} "
                    f"attempts: {error}"
                ) from error
            time.sleep(RETRY_S)
            return None
        self.version, self._in_a_row = version, 0
        return version, weights

    def _await(self) -> WeightMessage | None:
        """A version that was offered, waited for up to ``WAIT_S``; one that is already published,
        until it has come over from its node.

        The next call waits again for one that is still to be published. Every ``ASK_S`` the weight
        store is asked whether it still will be."""
        import ray

        # Every outcome of the wait is final, except that the version is not there yet.
        offered, self._offered = self._offered, None
        if offered is None or time.monotonic() - self._asked > ASK_S:
            offered = ray.get(self.weight_store.newer.remote(self.version, WAIT_S))
            self._asked = time.monotonic()
            if offered is None:
                return None
        [reference] = offered
        try:
            return ray.get(reference, timeout=WAIT_S)
        except ray.exceptions.GetTimeoutError:
            if ray.wait(offered, timeout=0, fetch_local=False)[0]:
                return ray.get(reference)  # it lies on another node
            self._offered = offered
            return None


def is_committed(buffer: ReplayBuffer, version: int, running: Callable[[], bool]) -> bool:
    """Whether a published version is committed: within milliseconds, unless its learner failed."""
    deadline, poll_s = time.monotonic() + COMMIT_S, COMMIT_POLL_S / 64
    while buffer.replay.version() < version:
        if time.monotonic() > deadline or not running():
            return False
        time.sleep(poll_s)
        poll_s = min(2 * poll_s, COMMIT_POLL_S)
    return True


def is_trained(name: str) -> bool:
    """Whether a tensor of a published checkpoint belongs to what is trained."""
    return not name.startswith(UNUSED) and not name.endswith(COMPUTED)


class ProvenWeights(list[tuple[str, Tensor]]):
    """Pairs that a ``WeightContract`` has checked."""


class WeightContract:
    """Names and shapes of the checkpoint an engine was started from.

    Raises ModelError as ``WeightFiles.find`` does.
    """

    def __init__(self, model_path: Path) -> None:
        self.headers = WeightFiles.find(model_path).headers()

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> ProvenWeights:
        """The update as a list, proven complete; one that is proven already as it is. Reads every
        value, which takes seconds for a large model. Names are those of the published checkpoint.

        Raises ModelError for a missing, unknown, doubled, misshapen, wrongly typed or non-finite
        tensor."""
        if isinstance(weights, ProvenWeights):
            return weights
        given: dict[str, Tensor] = {}
        for name, tensor in weights:
            if name in given:
                raise ModelError(f"weight update refused: tensor {name!r} comes twice")
            given[name] = tensor
        missing = [name for name in self.headers if name not in given and is_trained(name)]
        unknown = [name for name in given if name not in self.headers]
        if missing or unknown:
            raise ModelError(
                f"weight update refused: {len(missing)} tensors missing (first "
                f"{min(missing, default=None)!r}), "
                f"{len(unknown)} not in the base checkpoint (first "
                f"{min(unknown, default=None)!r}); "
                "publish every tensor under its published name"
            )
        for name, tensor in given.items():
            shape, floats = self.headers[name].shape, self.headers[name].floats
            if tuple(tensor.shape) != shape:
                raise ModelError(
                    f"weight update refused: {name!r} has shape {tuple(tensor.shape)}, the "
                    f"checkpoint {shape}; was another model published?"
                )
            if tensor.is_floating_point() != floats:
                kind = "a float" if floats else "an integer"
                raise ModelError(
                    f"weight update refused: {name!r} is {tensor.dtype}, the checkpoint has "
                    f"{kind} type"
                )
            if floats and not is_finite(tensor):
                raise ModelError(
                    f"weight update refused: {name!r} holds NaN or infinity; look at the "
                    "learner's loss"
                )
        return ProvenWeights(given.items())


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity; reads it once, writes nothing."""
    if tensor.numel() == 0:
        return True
    # Both survive in the extremes, which torch finds at the memory's speed in every type; a sum
    # in float32 of bfloat16 takes 20 times as long.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
