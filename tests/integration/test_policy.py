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

import avatar_rl.learner.model.head
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import MicroBatch, Row, collate, padded
from avatar_rl.learner.batch.plan import StepPlan, StepWork, plan_step
from avatar_rl.learner.config import LearnerConfig, ObjectiveConfig
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.learner.model.media import embed
from avatar_rl.learner.model.policy import Policy, freeze
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


def policy_of(stage: Stage) -> Policy:
    return Policy(load_model(stage.folder)).eval()


@pytest.fixture(scope="module")
def plain(stage: Stage) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Scores of every row and the gradients of their weighted sum, from full forwards."""
    model = load_reference(stage.folder)
    scores = plain_scores(model, stage, stage.rows)
    weights = weights_of(collate(stage.rows).mask)
    sum((w[: len(lp)] * lp).sum() for w, (lp, _) in zip(weights, scores, strict=True)).backward()  # type: ignore[union-attr]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [(lp.detach(), entropy.detach()) for lp, entropy in scores], found


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("tile", [512, 7])
def test_scores_and_gradients_equal_plain_forwards(
    stage: Stage, plain: Any, monkeypatch: pytest.MonkeyPatch, tile: int, recomputed: bool
) -> None:
    monkeypatch.setattr(avatar_rl.learner.model.head, "TILE", tile)
    scores, expected = plain
    model = load_model(stage.folder)
    if recomputed:
        recompute_activations(model)
    policy = Policy(model)
    batch = collate(stage.rows)
    # Each prompt once; every completion without its last token, which predicts nothing.
    assert len(batch.input_ids) == sum(len(case.prompt.input_ids) for case in stage.cases) + sum(
        len(row.token_ids) - 1 for row in stage.rows
    )
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
    assert_gradients_equal(found, expected, relative=1e-5)  # 7e-7 measured
    assert {
        "visual.patch_embed.proj.weight",
        "audio_tower.conv1.weight",
        "lm_head.weight",
    } <= found.keys()


def test_a_batch_of_single_token_completions(stage: Stage, plain: Any) -> None:
    """The pack is nothing but prompts then."""
    chosen = [i for i, row in enumerate(stage.rows) if len(row.token_ids) == 1]
    batch = collate([stage.rows[i] for i in chosen])
    assert len(batch.input_ids) == sum(len(case.prompt.input_ids) for case in stage.cases)
    output = policy_of(stage)(batch)
    expected = torch.stack([plain[0][i][0] for i in chosen])
    torch.testing.assert_close(output.logprobs, expected, atol=1e-5, rtol=0)


def test_embeddings_of_media_in_the_place_of_pixels(stage: Stage, plain: Any) -> None:
    """Half of the prompts bring what the encoders would make of their media; the others pixels."""
    policy = policy_of(stage)
    whole = collate(stage.rows)
    known = {}
    with torch.no_grad():
        for case in stage.cases[::2]:
            [first] = [row for row in stage.rows if row.key[0] == case.name][:1]
            media = embed(policy.model, collate([first]), ())[1]
            known[case.name] = media
    rows = [replace(row, media=known.get(row.key[0])) for row in stage.rows]
    batch = collate(rows)
    assert batch.media is not None
    assert len(batch.features["pixel_values"]) < len(whole.features["pixel_values"])
    runs: list[int] = []
    policy.model.visual.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr, operator]
    output = policy(batch)
    assert len(runs) == len(batch.encoders & {"image", "video"})
    for row, (logprobs, _) in zip(output.logprobs, plain[0], strict=True):
        torch.testing.assert_close(row[: len(logprobs)], logprobs, atol=1e-5, rtol=0)


def test_a_placeholder_that_a_completion_samples_is_a_token_like_others(stage: Stage) -> None:
    policy = policy_of(stage)
    row = next(row for row in stage.rows if row.key[0] == "image")
    token: int = policy.model.config.image_token_id  # type: ignore[union-attr, assignment]
    odd = replace(row, token_ids=np.array([30, token, 31], dtype=np.int32))
    assert policy(collate([odd, row])).logprobs.isfinite().all()
    prompt = replace(
        row.prompt, features=row.prompt.features | {"image_grid_thw": torch.ones(1, 3)}
    )
    assert prompt.features["image_grid_thw"].shape == (1, 3)
    torn = replace(row.prompt, input_ids=row.prompt.input_ids.clone())
    torn.input_ids[torn.input_ids == token] = 30
    with pytest.raises(ModelError, match="0 image placeholders, but its media fill"):
        policy(collate([replace(row, prompt=torn)]))


def test_frozen_parts_get_no_gradient_and_the_others_the_same(stage: Stage, plain: Any) -> None:
    policy = policy_of(stage)
    total = sum(p.numel() for p in policy.parameters())
    frozen = sum(
        p.numel() for n, p in policy.named_parameters() if "visual" in n or "audio_tower" in n
    )
    assert freeze(policy, ("visual", "audio_tower")) == total - frozen > 0
    batch = collate(stage.rows)
    (weights_of(batch.mask) * policy(batch).logprobs).sum().backward()
    found = gradients(policy)
    assert not any("visual" in name or "audio_tower" in name for name in found)
    assert_gradients_equal(found, {name: plain[1][name] for name in found}, relative=1e-4)
    assert freeze(policy, ()) == total - frozen  # what is frozen stays so: an adapter's base, say
    assert freeze(policy, ("model", "lm_head")) == 0


def test_reference_log_probabilities_are_computed_once_per_trajectory(
    stage: Stage, plain: Any
) -> None:
    reference = ReferencePolicy(
        stage.folder, dtype="float32", device=torch.device("cpu"), cached=12
    )
    computed: list[int] = []
    reference.policy.register_forward_pre_hook(lambda _, batch: computed.append(len(batch[0].mask)))
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
        stage.folder, dtype="float32", device=torch.device("cpu"), cached=12
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
        ReferencePolicy(path, dtype="float32", device=torch.device("cpu"), cached=12)
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
    batch: MicroBatch = collate(rows)
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
    for budget, ranks in ((100_000, 1), (500, 1), (300, 2), (340, 3)):
        policy = policy_of(stage)
        config = LearnerConfig(objective=objective, micro_batch_tokens=budget)
        plan = plan_step(work, config, ranks=ranks, max_tokens=20)
        total = 0.0
        for indices in (batch for share in plan.shares for batch in share):
            loss = contribution(policy, plan, prompts, indices, objective)
            loss.backward()
            total += float(loss.detach())
        outcomes.append((sum(map(len, plan.shares)), total, gradients(policy)))
    counts = [count for count, _, _ in outcomes]
    assert counts[0] == 1 < counts[1] < counts[2]
    for _, total, found in outcomes[1:]:
        assert total == pytest.approx(outcomes[0][1], abs=1e-6)
        assert_gradients_equal(found, outcomes[0][2], relative=5e-6)  # float32: 1.4e-6 measured


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    budget=st.integers(300, 1500),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_split_gives_the_same_loss_in_float64(
    stage: Stage, budget: int, ranks: int, seed: int
) -> None:
    """Text prompts, since the media features of a prompt are float32."""
    work, prompts = make_work(stage, names=("text", "long text"), seed=seed)
    objective = ObjectiveConfig(loss_type=("grpo", "dapo", "dr_grpo")[seed % 3])  # type: ignore[arg-type]
    totals = []
    for tokens, count in ((100_000, 1), (budget, ranks)):
        policy = policy_of(stage).double()
        config = LearnerConfig(objective=objective, micro_batch_tokens=tokens)
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
