"""What a group must satisfy before a byte of it is written."""

from __future__ import annotations

import math
import re

import numpy as np

from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory

MAX_SEQ = 10**8
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def group_id(seq: int) -> str:
    """Group id of the request at position ``seq`` of the prompt stream."""
    return f"{seq:08d}"


def trajectory_id(gid: str, index: int) -> str:
    """Id of the ``index``-th trajectory of a group."""
    return f"{gid}.{index}"


def _fault(t: Trajectory) -> str | None:
    tokens, logprobs = np.asarray(t.token_ids), np.asarray(t.logprobs)
    if tokens.ndim != 1 or tokens.shape != logprobs.shape:
        return (
            f"token_ids {tokens.shape} and logprobs {logprobs.shape} must be (T,) of equal length"
        )
    if tokens.dtype.kind not in "iu" or logprobs.dtype.kind != "f":
        return (
            f"token_ids are {tokens.dtype}, logprobs {logprobs.dtype}; they must be integers "
            "and floats"
        )
    if tokens.size == 0:
        return "empty completion; mask it before it gets here, or count it as dropped"
    if t.experts is not None:
        shape, kind = t.experts.shape, t.experts.dtype
        if len(shape) != 3 or shape[0] != tokens.size - 1 or kind not in (np.uint8, np.uint16):
            return (
                f"experts {shape} of type {kind} must be (T - 1, layers, k) of uint8 or uint16, "
                f"with {tokens.size} tokens"
            )
    accounted = 0
    for version, n in t.versions:
        if version < 0 or n < 0:
            return (
                f"policy versions {t.versions} must be a non-empty list of (version >= 0, "
                "tokens >= 0)"
            )
        accounted += n
    if accounted != tokens.size:  # no versions included
        return (
            f"policy versions {t.versions} account for {accounted} tokens, the completion has "
            f"{tokens.size}"
        )
    if not math.isfinite(t.reward):
        return f"reward is {t.reward}"
    for name, value in t.components.items():
        if value is not None and not math.isfinite(value):
            return f"reward component {name} is {value}; a failed component is None, not NaN"
    if not (math.isfinite(t.temperature) and t.temperature > 0):
        return f"temperature is {t.temperature}"
    if t.prompt_tokens < 0 or not 0 <= t.prompt_digest < 2**32:
        return f"prompt_tokens {t.prompt_tokens} or prompt_digest {t.prompt_digest} is out of range"
    return None


def _check_numbers(group: Group) -> None:
    """Token ids and log-probabilities of the whole group at once, which is cheaper than one by
    one."""
    tokens = np.concatenate([t.token_ids for t in group.trajectories])
    logprobs = np.concatenate([t.logprobs for t in group.trajectories])
    # A finite sum of squares has finite terms; a doubtful one is looked at closely.
    if (
        tokens.dtype == np.int32
        and np.minimum.reduce(tokens) >= 0
        and math.isfinite(np.dot(logprobs, logprobs))
    ):
        return
    for t in group.trajectories:
        finite = np.isfinite(t.logprobs)
        if not finite.all():
            raise RecordError(
                f"trajectory {t.id}: log-probability of token {int(np.argmin(finite))} is not "
                "finite"
            )
        if t.token_ids.min() < 0 or t.token_ids.max() >= 2**31:
            raise RecordError(f"trajectory {t.id}: a token id is negative or does not fit int32")


def check_group(group: Group) -> None:
    """Raises RecordError naming the group or trajectory and the field at fault."""
    if not 0 <= group.seq < MAX_SEQ or group.id != group_id(group.seq):
        raise RecordError(
            f"group {group.id}: seq {group.seq} asks for id {group_id(max(group.seq, 0))}"
        )
    if not group.prompt_id or group.step < 0:
        raise RecordError(
            f"group {group.id}: prompt id {group.prompt_id!r} or step {group.step} is out of range"
        )
    if not group.trajectories:
        raise RecordError(f"group {group.id} has no trajectory; quarantine its prompt instead")
    for i, t in enumerate(group.trajectories):
        if t.index != i or t.id != trajectory_id(group.id, i):
            raise RecordError(
                f"trajectory {t.id} of group {group.id}: position {i} asks for {group.id}.{i}"
            )
        if (
            t.group_id != group.id
            or t.prompt_id != group.prompt_id
            or t.step != group.step
            or t.hinted != group.hinted
        ):
            raise RecordError(
                f"trajectory {t.id}: group, prompt, step or hint flag differs from its group's"
            )
        if fault := _fault(t):
            raise RecordError(f"trajectory {t.id} of prompt {t.prompt_id}: {fault}")
    _check_numbers(group)


def is_success(t: Trajectory, component: str, at: float) -> bool:
    """Whether a trajectory counts as a success for eviction and diverse draws."""
    value = t.components.get(component)
    return (t.reward if value is None else value) >= at


def accuracy_marks(group: Group, component: str) -> str:
    """A letter for each trajectory: its accuracy is "0" (or less), "1" (or more), else "?"."""
    values = [t.components.get(component) for t in group.trajectories]
    return "".join(
        "?" if value is None or 0 < value < 1 else "0" if value <= 0 else "1" for value in values
    )


def zero_accuracy(group: Group, component: str) -> int:
    """1 when every known accuracy is 0 (or less), 0 when one is not, -1 when none is known."""
    known = [v for t in group.trajectories if (v := t.components.get(component)) is not None]
    if not known:
        return -1
    return int(all(v <= 0 for v in known))
