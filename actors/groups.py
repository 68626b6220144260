"""What a finished request becomes: facts for the scorer, a group for the buffer, an answer for the
evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.common.errors import DataError
from avatar_rl.prompts.encoding.digest import prompt_digest

if TYPE_CHECKING:
    from avatar_rl.actors.engine.engine import FinishedRequest
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.prompts.record import Prompt

#: Per completion: (reward, None when every component is masked; components by name, None where
#: masked).
Scores = list[tuple[float | None, dict[str, float | None]]]


class UnusableGroupError(DataError):
    """No completion of a group can be trained on, which is no fault of its prompt. ``reason`` goes
    into the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def completion_facts(finished: FinishedRequest) -> list[tuple[str, bool, float, int]]:
    """Per completion (text, finished, mean log-probability, tokens): plain data, as scorers share
    no code with us."""
    return [
        (
            item.text,
            item.finish_reason == "stop",
            float(item.logprobs.mean()) if len(item.token_ids) else 0.0,
            len(item.token_ids),
        )
        for item in finished.completions
    ]


def make_group(
    finished: FinishedRequest, lease: RequestLease, scores: Scores, *, temperature: float
) -> Group:
    """The scored group of one request. Completions whose every component is masked are left out:
    nothing is known of them, and a zero would be a lie (docs/method.md 1.5); so are those without a
    token, which have no log-probability.

    Raises UnusableGroupError when that is all of them: ``unscored`` (a judge was out), or
    ``empty``."""
    request = lease.request
    group_id = f"{request.seq:08d}"
    digest = prompt_digest(finished.prompt_token_ids)
    scored = [(item, *score) for item, score in zip(finished.completions, scores, strict=True)]
    written = [entry for entry in scored if len(entry[0].token_ids)]
    kept = [
        (item, reward, components) for item, reward, components in written if reward is not None
    ]
    trajectories = tuple(
        Trajectory(
            id=f"{group_id}.{index}",
            group_id=group_id,
            prompt_id=request.prompt_id,
            index=index,
            hinted=lease.hinted,
            prompt_tokens=len(finished.prompt_token_ids),
            prompt_digest=digest,
            token_ids=item.token_ids,
            logprobs=item.logprobs,
            versions=item.versions,
            finish_reason=item.finish_reason,
            temperature=temperature,
            reward=reward,
            components=components,
            step=request.step,
        )
        for index, (item, reward, components) in enumerate(kept)
    )
    if not trajectories:
        what = (
            "every reward component of all its completions is masked"
            if written
            else "its completions have no token"
        )
        raise UnusableGroupError(
            "unscored" if written else "empty",
            f"group {group_id} of prompt {request.prompt_id!r}: {what}",
        )
    return Group(
        id=group_id,
        prompt_id=request.prompt_id,
        seq=request.seq,
        step=request.step,
        hinted=lease.hinted,
        trajectories=trajectories,
    )


def evaluation_payload(prompt: Prompt, finished: FinishedRequest, scores: Scores) -> dict[str, Any]:
    """One held-out prompt's outcome, JSON-ready; accuracy is the mean over its completions."""
    accuracies = [components.get("accuracy") for _, components in scores]
    known = [value for value in accuracies if value is not None]
    first = finished.completions[0]
    return {
        **prompt.label(),
        "accuracy": sum(known) / len(known) if known else None,
        "components": scores[0][1],
        "text": first.text,
        "version": first.versions[0][0],
        "tokens": sum(len(item.token_ids) for item in finished.completions),
    }
