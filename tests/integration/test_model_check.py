"""Models of many families: their log-probabilities are the model's own, whatever shares the
micro-batch, or they are refused by name; an export is the policy for whoever loads it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from avatar_rl.buffer_service.weights.receiver import WeightContract
from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.model import check
from avatar_rl.learner.model.export import export_checkpoint
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.learner.model.names import NameMap
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.encoding.template import EncodedPrompt

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WINDOW = 4
HEAD = {"head_dim": 16}
MIXED = ["sliding_attention", "full_attention"]


def family(name: str, **settings: Any) -> Callable[[], nn.Module]:
    config = getattr(hf, name + ("TextConfig" if name == "Gemma3" else "Config"))
    model = getattr(hf, f"{name}ForCausalLM")
    return lambda: model(config(**settings))


TRAINED = {
    "softcap": family("Gemma2", **SIZES, **HEAD, sliding_window=WINDOW, layer_types=MIXED),
    "softcap, text of a multimodal family": family(
        "Gemma3", **SIZES, **HEAD, final_logit_softcapping=5.0, layer_types=MIXED, sliding_window=4
    ),
    "divided": family("Granite", **SIZES, logits_scaling=8.0),
    "multiplied": family("Cohere", **SIZES, logit_scale=0.0625, eos_token_id=2),
    "sliding window": family("Mistral", **SIZES, sliding_window=WINDOW),
    "experts": family("Mixtral", **SIZES, num_local_experts=4),
    "chunks": family("Cohere2", **SIZES, layer_types=MIXED, sliding_window=WINDOW, eos_token_id=2),
    "tied": family("Qwen2", **SIZES, tie_word_embeddings=True),
}
STATEFUL = {
    "lfm2": family("Lfm2", **SIZES, layer_types=["conv", "full_attention"]),
    "jamba": family(
        "Jamba",
        **SIZES,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
    ),
}


def saved(make: Callable[[], nn.Module], folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(1)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    model.to(dtype).save_pretrained(folder)  # type: ignore[operator]
    return folder


def rows_of(lengths: list[tuple[int, int]]) -> list[Row]:
    """A row for each (prompt, completion) length, each with a prompt of its own."""
    rng = np.random.default_rng(3)
    rows = []
    for number, (length, tokens) in enumerate(lengths):
        ids = torch.from_numpy(rng.integers(5, 200, length))
        prompt = EncodedPrompt(ids, torch.arange(length)[None], length)
        row = Row((str(number), False), prompt, rng.integers(5, 200, tokens).astype(np.int32))
        rows.append(row)
    return rows


def alone(model: nn.Module, row: Row) -> torch.Tensor:
    """Log-probabilities by the loaded model itself, defaults everywhere."""
    completion = torch.from_numpy(row.token_ids).long()
    ids = torch.cat([row.prompt.input_ids, completion])[None]
    logits = model(ids).logits[0, len(row.prompt.input_ids) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(1, completion[:, None])[:, 0]


Scored = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


def scored(model: nn.Module, logprobs: list[torch.Tensor]) -> Scored:
    """Log-probabilities of each row, and the gradients of a weighted sum of them, in float32."""
    sum((torch.linspace(-1, 2, len(one)) * one).sum() for one in logprobs).backward()  # type: ignore[union-attr]
    return [one.detach() for one in logprobs], {
        name.removeprefix("model." if isinstance(model, Policy) else ""): parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def gaps(found: Scored, expected: Scored) -> tuple[float, float]:
    """Largest difference of a log-probability; the difference of all gradients by their size."""
    assert found[1].keys() == expected[1].keys()
    together = [(found[1][name] - one, one) for name, one in expected[1].items()]
    apart, size = (
        torch.stack([x.norm() for x in whole]).norm() for whole in zip(*together, strict=True)
    )
    rows = zip(found[0], expected[0], strict=True)
    return max(float((f - e).abs().max()) for f, e in rows), float(apart / size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_scores_and_gradients_do_not_depend_on_what_shares_the_pack(
    tmp_path: Path, name: str, recomputed: bool, dtype: str
) -> None:
    """Against the model's own forward over each sequence alone: prompts on both sides of a window,
    completions that leave it. In bfloat16 a pack may be as far from float32 as that forward is."""
    folder = saved(TRAINED[name], tmp_path / "model", getattr(torch, dtype))
    rows = rows_of([(11, 6), (2, 9), (5, 1), (4, 3)])
    rows += [Row(row.key, row.prompt, row.token_ids[::-1].copy()) for row in rows]

    def plain(dtype: torch.dtype) -> Scored:
        own = hf.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=dtype
        )
        return scored(own, [alone(own, row) for row in rows])

    model = load_model(folder, dtype=dtype)
    if recomputed:
        recompute_activations(model)
    policy = Policy(model)
    output = policy(collate(rows)).logprobs
    found = scored(policy, [output[i, : len(row.token_ids)] for i, row in enumerate(rows)])
    exact = plain(torch.float32)
    score_gap, gradient_gap = gaps(found, exact)
    if dtype == "float32":
        assert score_gap < 1e-4 and gradient_gap < 1e-4
    else:
        usual_scores, usual_gradients = gaps(plain(torch.bfloat16), exact)
        assert score_gap < 2 * usual_scores and gradient_gap < 2 * usual_gradients


@pytest.mark.parametrize("name", STATEFUL)
def test_layers_that_carry_a_state_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"model type '{name}' cannot be trained here: .*state"):
        load_model(saved(STATEFUL[name], tmp_path / "model"))


@pytest.mark.parametrize("name", TRAINED)
def test_the_check_leaves_the_model_as_it_was(tmp_path: Path, name: str) -> None:
    folder = saved(TRAINED[name], tmp_path / "model")
    [row] = rows_of([(5, 4)])
    with torch.no_grad():
        expected = alone(hf.AutoModelForCausalLM.from_pretrained(folder), row)
        assert torch.equal(alone(load_model(folder), row), expected)


class Warped(nn.Module):
    """Does something after its head that nobody knows of."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how, self.config = model, how, model.config
        self.lm_head = model.lm_head

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return found

    def forward(self, **inputs: Any) -> Any:
        self.model.lm_head = self.lm_head
        output = self.model(**inputs)
        if self.how == "bend":
            output.logits = torch.sin(output.logits)
        elif self.how == "mix":  # as a mixture that drops tokens by how many there are
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output


@pytest.mark.parametrize("how", ["bend", "mix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_probabilities_than_the_models_own_are_refused(
    tmp_path: Path, how: str, dtype: torch.dtype
) -> None:
    model = load_model(saved(TRAINED["sliding window"], tmp_path / "model")).to(dtype)
    warped = Warped(model, "not at all")
    check.check_scores(warped, "fine")
    warped.how = how
    with pytest.raises(ModelError, match=r"model type 'warped'.* nats off"):
        check.check_scores(warped, "warped")


def test_models_without_a_head_or_with_a_hole_are_refused(tmp_path: Path) -> None:
    other = hf.RwkvConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ModelError, match="RwkvForCausalLM has no lm_head"):
        load_model(saved(lambda: hf.RwkvForCausalLM(other), tmp_path / "rwkv"))
    folder = saved(TRAINED["sliding window"], tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    lost = whole.pop("lm_head.weight")
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors, first 'lm_head\.weight'"):
        load_model(folder)
    save_file(whole | {"lm_head.weight": lost}, folder / "model.safetensors")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"quantization_config": {"bits": 4},' + config[1:])
    with pytest.raises(ModelError, match=r"'mistral'.* is quantised"):
        load_model(folder)


def test_weights_that_are_no_values_and_settings_that_are_none_are_named(tmp_path: Path) -> None:
    folder = saved(TRAINED["sliding window"], tmp_path / "model")
    file, config = folder / "model.safetensors", (folder / "config.json").read_text()
    whole = load_file(file)
    for tensors, words in (
        ({name: t.to(torch.int8) for name, t in whole.items()}, "as I8, which is quantised"),
        (whole | {"lm_head.weight": whole["lm_head.weight"] * torch.nan}, "hold NaN or infinity"),
        ({}, "'mistral'.*copy the folder again"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            load_model(folder)
    save_file(whole, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": "32"'))
    with pytest.raises(ModelError, match=r"'mistral'.*correct its config.json"):
        load_model(folder)


def train_and_export(base: Path, out: Path, dtype: str) -> nn.Module:
    """As a rank does: load in ``dtype``, change the weights, export; returns the policy's model."""
    model = load_model(base, dtype=dtype)
    names, policy = NameMap.of(model, base), Policy(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = {
        name.removeprefix("model."): parameter.detach()
        for name, parameter in policy.named_parameters(remove_duplicate=False)
    }
    [part] = names.parts
    [published] = names.publish([{name: weights[name] for name in part}])
    WeightContract(base).check(published.items())
    export_checkpoint(published, base, out)
    policy.release()
    return policy.model


@pytest.mark.parametrize("name", ["softcap", "multiplied", "sliding window", "tied"])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(
    ("held", "trained"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float32")],
)
@torch.no_grad()
def test_an_export_is_the_policy_for_whoever_loads_it_with_defaults(
    tmp_path: Path, name: str, repeated: bool, held: str, trained: str
) -> None:
    base = saved(TRAINED[name], tmp_path / "base", getattr(torch, held))
    tensors = load_file(base / "model.safetensors")
    if repeated:  # some publish a tied head all the same
        if "lm_head.weight" in tensors:
            return
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = train_and_export(base, tmp_path / "out", trained)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == getattr(torch, trained)
    [row] = rows_of([(9, 5)])
    assert torch.equal(alone(loaded, row), alone(model, row))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in model.state_dict().items():
        if name in exported:
            assert torch.equal(exported[name], tensor)


def test_an_export_may_be_read_as_the_umask_says(tmp_path: Path) -> None:
    base = saved(TRAINED["tied"], tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    for name in ("tokenizer.json", "additional_chat_templates/tools.jinja", "qwen.tiktoken"):
        (base / name).write_text("{}")
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (base / name).write_text("{}")
    for file in base.iterdir():
        if file.is_file():
            file.chmod(0o400)
    before = os.umask(0o027)
    try:
        train_and_export(base, tmp_path / "out", "float32")
    finally:
        os.umask(before)
    out = tmp_path / "out"
    modes = {
        str(path.relative_to(out)): stat.S_IMODE(path.stat().st_mode)
        for path in [out, *out.rglob("*")]
    }
    assert modes == {
        ".": 0o750,
        "additional_chat_templates": 0o750,
        "additional_chat_templates/tools.jinja": 0o640,
        "config.json": 0o640,
        "generation_config.json": 0o640,
        "model.safetensors": 0o640,
        "qwen.tiktoken": 0o640,
        "tokenizer.json": 0o640,
    }


@pytest.mark.parametrize("text", ['{"model_type": "qw', "[]", "7"])
def test_a_torn_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json .*copy the checkpoint again"):
        load_model(tmp_path)
