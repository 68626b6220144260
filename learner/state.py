"""The learner's state outside the learner: copied to host memory, replicated to another process,
written to a checkpoint.

What DeepSpeed would write into files (trained weights, optimiser moments, its counters) is caught
on its way there. Frozen weights stay out: they are those of the model that the run began with. So a
training step pauses for the serialisation alone. Checkpoints and the copy that outlives a rank are
made the same way."""

from __future__ import annotations

import io
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.adapter.base import FILE, BaseRecord
from avatar_rl.learner.state_replica import TAG, FileProof, Files, write_files

if TYPE_CHECKING:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
    from ray.actor import ActorHandle

    from avatar_rl.learner.engine import TrainEngine
    from avatar_rl.learner.model.reference import ReferenceCache

#: File of the reference's log-probabilities in a checkpoint. One without it is whole: what it lacks
#: is computed again.
REFERENCE = "reference.pt"

T = TypeVar("T")


def state_bytes(engine: TrainEngine) -> int:
    """Upper bound of the state over all ranks: of what is trained the weights, a float32 master
    copy and two moments. The same on every rank, whatever ZeRO has partitioned."""
    total = 0
    for parameter in engine.policy.parameters():
        if parameter.requires_grad:
            count = int(getattr(parameter, "ds_numel", parameter.numel()))
            total += count * (parameter.element_size() + 12)
    return total


def capture(engine: TrainEngine, rank: int) -> Files:
    """This rank's part of the state as files in memory. Collective: call it on every rank, between
    two steps."""
    return _caught(engine, rank, _serialised)


def snapshot(engine: TrainEngine, rank: int) -> dict[str, Any]:
    """The same, not yet made into files: what pauses training is a copy of the tensors to host
    memory, pinned where they come from a GPU. ``serialise`` does the rest beside it."""
    held = _caught(engine, rank, _HostCopy())
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)  # one wait for all copies
    return held


def serialise(held: dict[str, Any]) -> Files:
    """The files of a ``snapshot``."""
    return {name: _serialised(value) for name, value in held.items()}


def _caught(engine: TrainEngine, rank: int, take: Callable[[Any], T]) -> dict[str, T]:
    """What ``take`` makes of each value that DeepSpeed would save, by file name."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    files: dict[str, T] = {}
    # Under both names where two share a weight: DeepSpeed leaves out only one of them.
    named = engine.policy.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}

    class Memory(TorchCheckpointEngine):
        """Catches each file that DeepSpeed saves."""

        def __init__(self) -> None:
            self.name = "memory"

        def create(self, info: CheckpointCommitInfo) -> None: ...

        def save(self, state_dict: Any, path: str) -> None:
            if isinstance(module := state_dict.get("module"), dict):
                kept = {name: value for name, value in module.items() if name not in frozen}
                state_dict = {**state_dict, "module": kept}
            files[Path(path).name] = take(state_dict)

    usual = engine.engine.checkpoint_engine
    engine.engine.checkpoint_engine = Memory()
    try:
        # A folder, since DeepSpeed puts a script of its own there.
        with tempfile.TemporaryDirectory(prefix="avatar-") as scratch:
            engine.save(Path(scratch), TAG)
    finally:
        engine.engine.checkpoint_engine = usual
    files[f"random_{rank}.pt"] = take(
        {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }
    )
    return files


class _HostCopy:
    """Copies nested values with their tensors to host memory. What shares its memory does so in the
    copy, too: a tied weight is kept once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            # Of its own type, since an ordered one is read back as such.
            copied = copy(value)
            for key, item in value.items():
                copied[key] = self(item)
            return copied
        if isinstance(value, list):
            return [self(item) for item in value]
        if type(value) is tuple:
            return tuple(self(item) for item in value)
        return copy(value)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in self._made or not tensor.numel():
            on_gpu = tensor.is_cuda
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            host.copy_(tensor.detach(), non_blocking=on_gpu)
            if isinstance(tensor, torch.nn.Parameter):
                host = torch.nn.Parameter(host, requires_grad=tensor.requires_grad)
            self._made[place] = host
        return self._made[place]


def restore(engine: TrainEngine, rank: int, folder: Path) -> None:
    """Load what ``capture`` gave on all ranks, written into ``folder``/state. Collective.

    Raises ConfigError (another number of ranks or ZeRO stage) or ModelError (a file is missing, or
    holds more than weights and counters).
    """
    seeds = folder / TAG / f"random_{rank}.pt"
    if not seeds.is_file():
        raise ModelError(
            f"learner state {folder} has no {seeds.name}: it was written by fewer than {rank + 1} "
            "ranks"
        )
    with _only_weights(engine):
        engine.load(folder, TAG)
    states = load_weights(seeds)
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


@contextmanager
def _only_weights(engine: TrainEngine) -> Iterator[None]:
    """DeepSpeed reads its files by ``load_weights`` within the block."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Reader(TorchCheckpointEngine):
        """DeepSpeed's own reader would run whatever a pickle asks for."""

        def __init__(self) -> None:
            self.name = "weights"

        def load(self, path: str, map_location: torch.device | None = None) -> Any:
            return load_weights(Path(path), map_location)

    usual = engine.engine.checkpoint_engine
    engine.engine.checkpoint_engine = Reader()
    try:
        yield
    finally:
        engine.engine.checkpoint_engine = usual


def load_weights(path: Path, map_location: torch.device | None = None) -> Any:
    """What ``torch.save`` wrote, without running what a file may ask for (docs/security.md).

    Tensors, plain values, numpy's random state and DeepSpeed's counters are read. Raises ModelError
    for a file with anything else."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from numpy._core.multiarray import _reconstruct

    counters = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    arrays: list[type] = [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    try:
        with torch.serialization.safe_globals([_reconstruct, *counters, *arrays]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than weights and counters, so it was not opened: it was changed, "
            "or written by another version; restore it, or start from an older checkpoint"
        ) from error


def _serialised(value: Any) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return np.frombuffer(buffer.getbuffer(), dtype=np.uint8)


class StateReplicator:
    """Copies a rank's state out of its process: at every step to the state replica, and into
    checkpoints. Its methods run on every rank."""

    def __init__(
        self,
        engine: TrainEngine,
        rank: int,
        state_replica: ActorHandle | None,
        *,
        max_bytes: int,
        base: BaseRecord | None = None,
    ) -> None:
        self.engine, self.rank, self.state_replica = engine, rank, state_replica
        self.base = base  # that the state belongs to: frozen weights are not in it
        self.max_bytes = max_bytes  # a larger state is written into checkpoints only
        #: Of replays, kept in checkpoints; a rank that takes over from the replica computes anew.
        self.reference: ReferenceCache | None = None
        self._captured: dict[str, Any] | None = None
        self._reference: dict[str, Any] | None = None  # captured with it

    def replicate(self, version: int) -> None:
        """Leave a copy of the state that is about to become ``version`` with the state replica.

        Returns once all ranks have. So a run can resume from every version that is committed after
        that. Does nothing for a state that is larger than ``max_bytes``.
        """
        import ray

        if self.state_replica is None or state_bytes(self.engine) > self.max_bytes:
            return
        files = self._with_base(capture(self.engine, self.rank))
        ray.get(self.state_replica.store.remote(version, self.rank, files))
        if self.engine.world_size > 1:
            dist.barrier()

    def capture(self) -> None:
        """Copy the state into this process's memory; training may continue while ``write`` writes
        it."""
        self._captured = snapshot(self.engine, self.rank)
        if self.reference is not None and self.rank == 0:  # every rank has the same
            self._reference = self.reference.state()

    def _with_base(self, files: Files) -> Files:
        if self.base is not None and self.rank == 0:
            files[FILE] = np.frombuffer(self.base.content(), dtype=np.uint8)
        return files

    def write(self, folder: Path) -> dict[str, FileProof]:
        """Write what ``capture`` copied below ``folder``; runs beside a training step. Once for
        each copy: raises ModelError when there is none."""
        held, self._captured = self._captured, None
        if held is None:
            raise ModelError(
                f"learner rank {self.rank} has captured no state to write: it is a new one"
            )
        files = self._with_base(serialise(held))
        known, self._reference = self._reference, None
        if self.reference is not None and known is not None:
            files[REFERENCE] = _serialised(self.reference.packed(known))
        return write_files(files, folder)

    def restore(self, folder: Path) -> None:
        """Resume from a state that was written below ``folder``. Raises ModelError for one of
        another base, and as the function of that name does."""
        if self.base is not None:
            self.base.check(BaseRecord.read(folder / TAG), folder)
        restore(self.engine, self.rank, folder)
        file = folder / TAG / REFERENCE
        if self.reference is not None and file.is_file():
            self.reference.load(load_weights(file))
