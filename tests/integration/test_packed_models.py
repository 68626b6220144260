"""A pack of each real architecture against transformers' own forward over each completion alone:
log-probabilities, entropies and gradients, with recomputed activations too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.learner.model.media import embed
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.config import TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.tiny_models import (
    ArrayLoader,
    audio,
    build_vision_language,
    image,
    load_reference,
    make_prompt,
    video,
)

BUILD: dict[str, Callable[[Path], Path]] = {
    "qwen3": partial(build_vision_language, kind="qwen3"),
    "qwen2_5_vl": partial(build_vision_language, kind="qwen2_5_vl"),
    "qwen3_vl": partial(build_vision_language, kind="qwen3_vl"),
    "qwen2_5_omni": build_tiny_omni,
}
MEDIA = {
    "qwen3": ((), (), ()),
    "qwen2_5_vl": (("image",), ("video", "image"), ()),
    "qwen3_vl": (("image",), ("video", "image"), ()),
    "qwen2_5_omni": (("image", "audio"), ("video", "audio", "image"), ()),
}
LENGTHS = (7, 1, 4)


class Scores(NamedTuple):
    logprobs: list[Tensor]
    entropies: list[Tensor]
    gradients: dict[str, Tensor]


class Stage(NamedTuple):
    folder: Path
    rows: list[Row]  # three of each prompt, mixed up


@pytest.fixture(scope="module")
def stage_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stage]:
    @cache
    def made(kind: str) -> Stage:
        folder = BUILD[kind](tmp_path_factory.mktemp(kind) / "model")
        loader = ArrayLoader()
        encoder = PromptEncoder(folder, loader, TemplateConfig())
        rng, rows = np.random.default_rng(0), []
        for number, names in enumerate(MEDIA[kind]):
            every = {
                "image": image(number),
                "video": video(number, 4, 2.0),
                "audio": audio(number, 1.0 + number),
            }
            prompt = make_prompt(
                loader,
                f"p{number}",
                [every[name] for name in names],
                question="why " * (number + 1),
            )
            encoded = encoder.encode(prompt, hinted=False)
            rows += [
                Row((prompt.id, False), encoded, rng.integers(30, 250, n).astype(np.int32), heat)
                for n, heat in zip(LENGTHS, (1.0, 0.7, 1.3), strict=True)
            ]
        return Stage(folder, rows[::2] + rows[1::2])

    return made


def alone(model: Any, row: Row) -> torch.distributions.Categorical:
    """Next-token distributions (T,) of one forward over prompt and completion."""
    prompt, tokens = row.prompt, torch.from_numpy(row.token_ids).long()
    ids = torch.cat([prompt.input_ids, tokens])[None]
    steps = prompt.next_position + torch.arange(len(tokens))
    positions = torch.cat([prompt.position_ids, steps.expand(len(prompt.position_ids), -1)], 1)[
        :, None
    ]
    features = {
        name: value.to(model.dtype) if name == "input_features" else value
        for name, value in prompt.features.items()
    }
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions if len(positions) > 1 else positions[0],
        **features,
    )
    logits = output.logits[0, len(prompt.input_ids) - 1 : -1].float()
    return torch.distributions.Categorical(logits=logits / row.temperature)


def scored(model: nn.Module, logprobs: list[Tensor], entropies: list[Tensor]) -> Scores:
    """With the gradients of a sum that weighs every token otherwise."""
    sum((torch.linspace(-1, 2, len(one)) * one).sum() for one in logprobs).backward()  # type: ignore[union-attr]
    prefix = "model." if isinstance(model, Policy) else ""
    gradients = {
        name.removeprefix(prefix): parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Scores(
        [one.detach() for one in logprobs], [one.detach() for one in entropies], gradients
    )


def exact_model(folder: Path) -> nn.Module:
    """float64, its weights those of a bfloat16 model."""
    model: nn.Module = load_reference(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model.double()


def plain(model: nn.Module, stage: Stage) -> Scores:
    found = [alone(model, row) for row in stage.rows]
    tokens = [torch.from_numpy(row.token_ids).long() for row in stage.rows]
    logprobs = [one.log_prob(t) for one, t in zip(found, tokens, strict=True)]
    return scored(model, logprobs, [one.entropy() for one in found])


def packed(policy: Policy, rows: list[Row]) -> Scores:
    output = policy(collate(rows))
    sizes = [len(row.token_ids) for row in rows]
    logprobs, entropies = (
        [values[i, :size] for i, size in enumerate(sizes)]
        for values in (output.logprobs, output.entropy)
    )
    return scored(policy, logprobs, entropies)


def gaps(found: Scores, expected: Scores) -> tuple[float, float, float]:
    """Largest differences of log-probability and entropy; that of all gradients by their size."""
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = [(found.gradients[name], one) for name, one in expected.gradients.items()]
    apart = torch.stack([(left - right).norm() for left, right in pairs]).norm()
    size = torch.stack([right.norm() for _, right in pairs]).norm()
    largest = [
        max(float((f - e).abs().max()) for f, e in zip(left, right, strict=True))
        for left, right in zip(found[:2], expected[:2], strict=True)
    ]
    return largest[0], largest[1], float(apart / size)


def policy_of(stage: Stage, dtype: str, recomputed: bool) -> Policy:
    model = load_model(stage.folder, dtype=dtype)
    if recomputed:
        recompute_activations(model)
    return Policy(model)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", BUILD)
def test_a_pack_is_each_completion_alone(
    stage_of: Callable[[str], Stage], kind: str, recomputed: bool
) -> None:
    stage = stage_of(kind)
    expected = plain(load_reference(stage.folder), stage)
    found = packed(policy_of(stage, "float32", recomputed), stage.rows)
    logprobs, entropies, gradients = gaps(found, expected)
    assert logprobs < 1e-5 and entropies < 1e-5 and gradients < 1e-5


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", BUILD)
def test_in_bfloat16_a_pack_is_no_farther_off_than_that_is(
    stage_of: Callable[[str], Stage], kind: str, recomputed: bool
) -> None:
    """Both against float64. The pack's logits are not rounded, transformers' are."""
    stage = stage_of(kind)
    exact = plain(exact_model(stage.folder), stage)
    usual = plain(load_model(stage.folder, dtype="bfloat16"), stage)
    found = packed(policy_of(stage, "bfloat16", recomputed), stage.rows)
    for ours, theirs in zip(gaps(found, exact), gaps(usual, exact), strict=True):
        assert ours < 1.5 * theirs


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen2_5_omni"])
def test_embeddings_made_beforehand_are_as_good_as_pixels(
    stage_of: Callable[[str], Stage], kind: str
) -> None:
    """One prompt of the pack brings embeddings, and deepstack features where the model has them;
    the others bring pixels."""
    stage = stage_of(kind)
    policy = policy_of(stage, "float32", False)
    first = next(row for row in stage.rows if row.key[0] == "p1")
    with torch.no_grad():
        media = embed(policy.model, collate([first]), ())[1]
        assert media is not None and (media.deepstack is not None) == (kind == "qwen3_vl")
        rows = [replace(row, media=media) if row.key[0] == "p1" else row for row in stage.rows]
        batch = collate(rows)
        assert "video" not in batch.encoders and "image" in batch.encoders
        expected, found = policy(collate(stage.rows)), policy(batch)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
