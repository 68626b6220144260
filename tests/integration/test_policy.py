"""Log-probabilities, entropies and gradients of the policy against plain transformers forwards, one
per completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import avatar_rl.learner.model.policy
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import MicroBatch, Row, collate, padded
from avatar_rl.learner.batch.plan import StepPlan, StepWork, plan_step
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy, freeze, length_runs
from avatar_rl.learner.model.reference import ReferencePolicy
from avatar_rl.learner.objective.loss import policy_loss
from avatar_rl.learner.objective.shaping import tas_weights
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.tiny_models import (
    ArrayLoader,
    allowed_token_ids,
    audio,
    image,
    load_reference,
    make_prompt,
    respawn,
    video,
)

TEMPERATURES = (1.0, 0.7, 1.3)
LENGTHS = (9, 1, 14)  # completion tokens of a prompt's three rows


class Case(NamedTuple):
    """A prompt and what transformers' own position rule needs of it."""

    name: str
    prompt: EncodedPrompt
    forward: dict[str, Any]


class Stage(NamedTuple):
    folder: Path
    cases: list[Case]
    rows: list[Row]  # three of each prompt, mixed up


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = build_tiny_omni(tmp_path_factory.mktemp("policy") / "model")
    loader = ArrayLoader()
    encoder = PromptEncoder(folder, loader, TemplateConfig())
    timed: dict[str, Any] = {
        "video_second_per_grid": torch.tensor([1.0])
    }  # two frames at 2 per second
    prompts: list[tuple[Prompt, dict[str, Any]]] = [
        (make_prompt(loader, "text", []), {}),
        (make_prompt(loader, "long text", [], question="how many red squares are there " * 9), {}),
        (make_prompt(loader, "image", [image(1)]), {}),
        (make_prompt(loader, "two images", [image(2), image(3)]), {}),
        (make_prompt(loader, "separate", [video(4, 4, 2.0), audio(5, 1.5)]), timed),
        (make_prompt(loader, "longer sound", [video(6, 2, 2.0), audio(7, 3.1)]), timed),
        (
            make_prompt(
                loader, "interleaved", [video(8, 8, 2.0), audio(9, 3.9)], audio_in_video=True
            ),
            timed | {"use_audio_in_video": True},
        ),
    ]
    cases = [
        Case(prompt.id, encoder.encode(prompt, hinted=False), extra) for prompt, extra in prompts
    ]
    allowed = np.array(allowed_token_ids(encoder.tokenizer), dtype=np.int32)
    rng = np.random.default_rng(0)
    rows = [
        Row((case.name, False), case.prompt, rng.choice(allowed, length), temperature)
        for length, temperature in zip(LENGTHS, TEMPERATURES, strict=True)
        for case in cases
    ]
    return Stage(folder, cases, rows)


def plain_logits(model: Any, case: Case, row: Row) -> Tensor:
    """(T, V) of one forward over [prompt | completion], positions left to transformers."""
    ids = torch.cat([case.prompt.input_ids, torch.from_numpy(row.token_ids).long()])[None]
    # Transformers counts positions per call; whoever called before must not matter.
    model.rope_deltas = None
    output = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), **case.prompt.features, **case.forward
    )
    return output.logits[0, len(case.prompt.input_ids) - 1 : -1].float()


def plain_scores(model: Any, stage: Stage, rows: list[Row]) -> list[tuple[Tensor, Tensor]]:
    """(log-probabilities, entropies) of each row, by torch.distributions."""
    cases = {case.name: case for case in stage.cases}
    scores = []
    for row in rows:
        logits = plain_logits(model, cases[row.key[0]], row) / row.temperature
        distribution = torch.distributions.Categorical(logits=logits)
        scores.append(
            (distribution.log_prob(torch.from_numpy(row.token_ids).long()), distribution.entropy())
        )
    return scores


def weights_of(mask: Tensor) -> Tensor:
    """A fixed weight per token, of either sign, so that no gradient cancels."""
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * mask


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {
        n.removeprefix("model."): p.grad for n, p in policy.named_parameters() if p.grad is not None
    }


def assert_gradients_equal(
    left: dict[str, Tensor], right: dict[str, Tensor], *, relative: float
) -> None:
    """Relative to the norm of all gradients: some (key biases) are zero but for rounding."""
    assert left.keys() == right.keys()
    scale = torch.stack([g.norm() for g in right.values()]).norm()
    difference = torch.stack([(left[name] - right[name]).norm() for name in right]).norm()
    assert scale > 1e-3 and difference <= relative * scale


def policy_of(stage: Stage, *, share_prefix: bool) -> Policy:
    return Policy(load_model(stage.folder), share_prefix=share_prefix).eval()


@pytest.fixture(scope="module")
def plain(stage: Stage) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Scores of every row and the gradients of their weighted sum, from full forwards."""
    model = load_reference(stage.folder)
    scores = plain_scores(model, stage, stage.rows)
    weights = weights_of(collate(stage.rows, share_prefix=False).mask)
    sum((w[: len(lp)] * lp).sum() for w, (lp, _) in zip(weights, scores, strict=True)).backward()  # type: ignore[union-attr]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [(lp.detach(), entropy.detach()) for lp, entropy in scores], found


@pytest.mark.parametrize(("share_prefix", "gain"), [(True, 256), (True, 40), (False, 256)])
@pytest.mark.parametrize("chunk", [2048, 7])
def test_scores_and_gradients_equal_plain_forwards(
    stage: Stage,
    plain: Any,
    monkeypatch: pytest.MonkeyPatch,
    share_prefix: bool,
    chunk: int,
    gain: int,
) -> None:
    monkeypatch.setattr(avatar_rl.learner.model.policy, "LOGIT_CHUNK", chunk)
    monkeypatch.setattr(
        avatar_rl.learner.model.policy, "RUN_GAIN", gain
    )  # 40: three runs, one of single tokens
    assert len(length_runs([len(row.token_ids) for row in stage.rows])) == (3 if gain == 40 else 1)
    scores, expected = plain
    policy = policy_of(stage, share_prefix=share_prefix)
    batch = collate(stage.rows, share_prefix=share_prefix)
    assert len(batch.prompt_ids) == (len(stage.cases) if share_prefix else len(stage.rows))
    output = policy(batch)
    for row, (logprobs, entropy) in enumerate(scores):
        length = len(logprobs)
        torch.testing.assert_close(output.logprobs[row, :length], logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.entropy[row, :length], entropy, atol=1e-5, rtol=0)
        assert (output.logprobs[row, length:] == 0).all() and (
            output.entropy[row, length:] == 0
        ).all()
    assert not output.entropy.requires_grad
    (weights_of(batch.mask) * output.logprobs).sum().backward()
    found = gradients(policy)
    assert_gradients_equal(found, expected, relative=1e-4)
    assert {
        "visual.patch_embed.proj.weight",
        "audio_tower.conv1.weight",
        "lm_head.weight",
    } <= found.keys()


@pytest.mark.parametrize("chunks", [1, 3, 90])
def test_the_head_runs_as_often_as_it_is_told_to(stage: Stage, plain: Any, chunks: int) -> None:
    """Twice that under gradients and with several chunks; 90 are more than there are tokens."""
    policy = policy_of(stage, share_prefix=True)
    runs: list[int] = []
    policy.lm_head.register_forward_pre_hook(lambda _, hidden: runs.append(len(hidden[0])))
    batch = collate(stage.rows[:3], share_prefix=True)
    output = policy(batch, chunks)
    output.logprobs.sum().backward()
    assert len(runs) == chunks * (2 if chunks > 1 else 1)
    assert (0 in runs) == (chunks == 90)
    for row, (logprobs, _) in zip(output.logprobs, plain[0][:3], strict=True):
        torch.testing.assert_close(row[: len(logprobs)], logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_batch_of_single_token_completions(stage: Stage, plain: Any, uniform: bool) -> None:
    chosen = [i for i, row in enumerate(stage.rows) if len(row.token_ids) == 1]
    batch = collate([stage.rows[i] for i in chosen], share_prefix=True)
    policy = policy_of(stage, share_prefix=True)
    policy.uniform = uniform
    runs: list[int] = []
    policy.model.register_forward_pre_hook(lambda *_: runs.append(1))
    output = policy(batch)
    assert len(runs) == (2 if uniform else 1)  # ranks under ZeRO 3 must run the model equally often
    expected = torch.stack([plain[0][i][0] for i in chosen])
    torch.testing.assert_close(output.logprobs, expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing(stage: Stage) -> None:
    found = []
    for recompute in (False, True):
        model = load_model(stage.folder)
        if recompute:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        policy = Policy(model, share_prefix=False)
        batch = collate(stage.rows[:14], share_prefix=False)
        (weights_of(batch.mask) * policy(batch).logprobs).sum().backward()
        found.append(gradients(policy))
    assert_gradients_equal(found[1], found[0], relative=1e-6)


def test_copies_of_a_prompt_are_needed_without_a_shared_prefix(stage: Stage) -> None:
    with pytest.raises(ValueError, match="one prompt per completion"):
        policy_of(stage, share_prefix=False)(collate(stage.rows, share_prefix=True))


def test_frozen_parts_get_no_gradient_and_the_others_the_same(stage: Stage, plain: Any) -> None:
    policy = policy_of(stage, share_prefix=True)
    total = sum(p.numel() for p in policy.parameters())
    frozen = sum(
        p.numel() for n, p in policy.named_parameters() if "visual" in n or "audio_tower" in n
    )
    assert freeze(policy, ("visual", "audio_tower")) == total - frozen > 0
    batch = collate(stage.rows, share_prefix=True)
    (weights_of(batch.mask) * policy(batch).logprobs).sum().backward()
    found = gradients(policy)
    assert not any("visual" in name or "audio_tower" in name for name in found)
    assert_gradients_equal(found, {name: plain[1][name] for name in found}, relative=1e-4)
    assert freeze(policy, ()) == total  # thawed
    assert freeze(policy, ("model", "lm_head")) == 0


def test_reference_log_probabilities_are_computed_once_per_trajectory(
    stage: Stage, plain: Any
) -> None:
    reference = ReferencePolicy(
        stage.folder, dtype="float32", share_prefix=True, device=torch.device("cpu"), cached=12
    )
    computed: list[int] = []
    reference.policy.register_forward_pre_hook(lambda _, batch: computed.append(len(batch[0].rows)))
    ids = [str(i) for i in range(len(stage.rows))]

    def check(chosen: list[int]) -> None:
        values = reference.logprobs([ids[i] for i in chosen], [stage.rows[i] for i in chosen])
        expected = padded([plain[0][i][0].numpy() for i in chosen])
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
        assert not values.requires_grad

    check(list(range(8)))
    check([6, 2, 9])  # two are known
    assert computed == [8, 1]
    check(list(range(10, 21)))  # more than fits beside them: the oldest leave
    check([9, 0])
    assert computed == [8, 1, 11, 1]


def test_reference_log_probabilities_that_are_nan_are_not_kept(stage: Stage) -> None:
    reference = ReferencePolicy(
        stage.folder, dtype="float32", share_prefix=True, device=torch.device("cpu"), cached=12
    )
    broken = reference.policy.register_forward_hook(
        lambda _, batch, output: output._replace(
            logprobs=output.logprobs.index_fill(0, torch.tensor([1]), torch.nan)
        )
    )
    names, rows = ["a", "b"], stage.rows[:2]
    assert reference.logprobs(names, rows).isnan().any(1).tolist() == [False, True]
    broken.remove()
    assert reference.logprobs(names, rows).isfinite().all()


def test_another_reference_or_other_tokens_under_a_known_id_are_computed_anew(
    stage: Stage, tmp_path: Path
) -> None:
    """What is remembered belongs to one reference model and to the very tokens, not to the id
    alone."""
    respawn(stage.folder, tmp_path / "other", seed=5)
    first, other = (
        ReferencePolicy(
            path, dtype="float32", share_prefix=True, device=torch.device("cpu"), cached=12
        )
        for path in (stage.folder, tmp_path / "other")
    )
    row = stage.rows[0]
    changed = replace(row, token_ids=row.token_ids[::-1].copy())
    values = first.logprobs(["00000001.0"], [row])
    assert (other.logprobs(["00000001.0"], [row]) - values).abs().max() > 0.1
    assert (first.logprobs(["00000001.0"], [changed]) - values).abs().max() > 1e-3
    assert torch.equal(first.logprobs(["00000001.0"], [row]), values)


# -- a whole step ----------------------------------------------------------------------------------


def make_work(
    stage: Stage, *, names: Sequence[str] = (), seed: int = 3
) -> tuple[StepWork, dict[tuple[str, bool], EncodedPrompt]]:
    """A group of two fresh completions and a replay per prompt, behaviour log-probabilities near
    the policy's."""
    rng = np.random.default_rng(seed)
    groups, replays = [], []
    for seq, case in enumerate(case for case in stage.cases if not names or case.name in names):
        name = f"{seq:08d}"
        members = []
        for index, row in enumerate(row for row in stage.rows if row.key[0] == case.name):
            tokens = len(row.token_ids)
            members.append(
                Trajectory(
                    id=f"{name}.{index}",
                    group_id=name,
                    prompt_id=case.name,
                    index=index,
                    hinted=False,
                    prompt_tokens=len(case.prompt.input_ids),
                    prompt_digest=case.prompt.digest,
                    token_ids=row.token_ids,
                    logprobs=rng.normal(-6, 0.2, tokens).astype(np.float32),
                    versions=((0, tokens),),
                    finish_reason="stop",
                    temperature=row.temperature,
                    reward=float(rng.random()),
                    components={},
                    step=0,
                )
            )
        groups.append(
            Group(
                id=name,
                prompt_id=case.name,
                seq=seq,
                step=0,
                hinted=False,
                trajectories=tuple(members[:2]),
            )
        )
        replays.append(members[2])
    work = StepWork(0, 0, tuple(groups), tuple(replays), tuple(rng.random(len(replays)).tolist()))
    return work, {(case.name, False): case.prompt for case in stage.cases}


def contribution(
    policy: Policy,
    plan: StepPlan,
    prompts: dict[tuple[str, bool], EncodedPrompt],
    indices: list[int],
    config: ObjectiveConfig,
) -> Tensor:
    chosen = [plan.trajectories[i] for i in indices]
    keys = [(t.prompt_id, t.hinted) for t in chosen]
    rows = [
        Row(key, prompts[key], t.token_ids, t.temperature)
        for key, t in zip(keys, chosen, strict=True)
    ]
    batch: MicroBatch = collate(rows, share_prefix=policy.share_prefix)
    logprobs = policy(batch).logprobs
    return policy_loss(
        logprobs,
        padded([t.logprobs for t in chosen]),
        batch.mask,
        plan.advantages.values[indices].float(),
        tas_weights(batch.mask),
        plan.is_replay[indices],
        logprobs.detach() - 0.1,
        config,
        totals=plan.totals,
    ).loss


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_and_gradients_of_a_step_do_not_depend_on_its_split(
    stage: Stage, loss_type: Any
) -> None:
    work, prompts = make_work(stage)
    objective = ObjectiveConfig(loss_type=loss_type)
    outcomes = []
    for budget, ranks, share_prefix in (
        (100_000, 1, True),
        (500, 1, True),
        (16, 2, True),
        (900, 3, False),
    ):
        policy = policy_of(stage, share_prefix=share_prefix)
        config = LearnerConfig(
            objective=objective, micro_batch_tokens=budget, share_prefix=share_prefix
        )
        plan = plan_step(work, config, ranks=ranks, max_tokens=20)
        total = 0.0
        for indices in (batch for share in plan.shares for batch in share):
            loss = contribution(policy, plan, prompts, indices, objective)
            loss.backward()
            total += float(loss.detach())
        outcomes.append((sum(map(len, plan.shares)), total, gradients(policy)))
    counts = [count for count, _, _ in outcomes]
    assert counts[0] == 1 and counts[1] > 1 and counts[2] == 21
    for _, total, found in outcomes[1:]:
        assert total == pytest.approx(outcomes[0][1], abs=1e-6)
        assert_gradients_equal(found, outcomes[0][2], relative=5e-6)  # float32: 1.4e-6 measured


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    budget=st.integers(16, 1500),
    ranks=st.integers(1, 4),
    share_prefix=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_split_gives_the_same_loss_in_float64(
    stage: Stage, budget: int, ranks: int, share_prefix: bool, seed: int
) -> None:
    """Text prompts, since the media features of a prompt are float32."""
    work, prompts = make_work(stage, names=("text", "long text"), seed=seed)
    objective = ObjectiveConfig(loss_type=("grpo", "dapo", "dr_grpo")[seed % 3])  # type: ignore[arg-type]
    totals = []
    for tokens, count, shared in ((100_000, 1, True), (budget, ranks, share_prefix)):
        policy = policy_of(stage, share_prefix=shared).double()
        config = LearnerConfig(objective=objective, micro_batch_tokens=tokens, share_prefix=shared)
        plan = plan_step(work, config, ranks=count, max_tokens=20)
        with torch.no_grad():
            parts = [
                contribution(policy, plan, prompts, indices, objective)
                for share in plan.shares
                for indices in share
            ]
        assert all(part.dtype == torch.float64 for part in parts)
        totals.append(float(sum(parts)))
    assert totals[1] == pytest.approx(totals[0], abs=1e-9)


# -- loading ---------------------------------------------------------------------------------------


def test_model_folders_that_cannot_be_loaded_are_named(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((stage.folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
        load_model(tmp_path)
    save_file({"strange": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks \d+ tensors, first 'audio_tower"):
        load_model(tmp_path)
