"""Whether the policy's log-probabilities are the model's own, tried when a model is loaded.

A model may work on its logits after the head, carry a state from token to token, or take no
positions. Training would then follow other probabilities than the engine samples from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from avatar_rl.common.errors import ModelError
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.encoding.rope import MULTIMODAL
from avatar_rl.prompts.encoding.template import EncodedPrompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

#: Largest difference of a token in float32; in a shorter type the median of all tokens counts,
#: for rounding alone can move single ones far.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
TOLERANCE_HALF = 0.2
REMEDY = "use a model of another type"
#: Layers whose tokens look at others through a mask. Others mix neighbours in a pack.
MASKED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
#: (which of two prompts, completion tokens): neighbours of other lengths.
ROWS = ((0, 4), (1, 2), (0, 1))
PROMPTS = (6, 3)  # tokens


def check_layers(config: PretrainedConfig, kind: str) -> None:
    """Raises ModelError for layers that take no attention mask: linear attention, state space,
    convolution."""
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if others := sorted(layers - MASKED_LAYERS):
        raise ModelError(
            f"model type {kind!r} cannot be trained here: its layers of kind {', '.join(others)} "
            "carry a state from token to token, so several completions cannot follow one prompt; "
            f"{REMEDY}"
        )


@torch.no_grad()
def check_scores(model: nn.Module, kind: str) -> None:
    """Compare the log-probabilities of a mixed micro-batch with those of each sequence alone, from
    the model's own forward over a few random tokens. The model is left as it was.

    Raises ModelError naming the model type ``kind`` where they differ or cannot be computed.
    """
    rows = _rows(model.config, axes=3 if kind in MULTIMODAL else 1)  # type: ignore[arg-type]
    try:
        with _plain_attention(model):
            expected = [_alone(model, row) for row in rows]
        policy = Policy(model)
        try:
            found = policy(collate(rows).to(_device(model))).logprobs
        finally:
            policy.release()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model type {kind!r} cannot be trained here: its forward fails on a pack of prompts "
            f"and completions ({type(error).__name__}: {error}); {REMEDY}"
        ) from error
    gaps = torch.cat([(found[i, : len(one)] - one).abs() for i, one in enumerate(expected)])
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCE.get(dtype, TOLERANCE_HALF)
    gap = float(gaps.max() if dtype in TOLERANCE else gaps.median())
    if math.isnan(gap):
        raise ModelError(
            f"a model of type {kind!r} gives log-probabilities that are no numbers: its weights "
            "hold NaN or infinity; copy the checkpoint again, or take one from before"
        )
    if gap > tolerance:
        raise ModelError(
            f"model type {kind!r} cannot be trained here: in a pack of prompts and completions "
            f"its log-probabilities are {gap:.2g} nats off those of each sequence alone (allowed "
            f"{tolerance:g}), since it changes the logits after its head, carries a state from "
            f"token to token or takes no attention mask of ours; {REMEDY}"
        )


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """transformers' fast attention leaves out the cap on Gemma 2's scores; the plain one has it."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    own = config._attn_implementation
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = own


def _rows(config: PretrainedConfig, axes: int) -> list[Row]:
    """Completions of random ordinary tokens."""
    special = set(_special(config.to_dict()))
    size = config.get_text_config().vocab_size
    ordinary = [token for token in range(size // 8, size // 2) if token not in special]
    rng = np.random.default_rng(0)
    prompts = []
    for length in PROMPTS:
        ids = torch.from_numpy(rng.choice(ordinary, length)).long()
        prompts.append(EncodedPrompt(ids, torch.arange(length).expand(axes, -1), length))
    return [
        Row((str(which), False), prompts[which], rng.choice(ordinary, length).astype(np.int32))
        for which, length in ROWS
    ]


def _special(settings: dict[str, object]) -> Iterator[int]:
    """Token ids that a config names, wherever it does."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int):
                    yield one


def _device(model: nn.Module) -> torch.device:
    """Of its language model; a tower that nothing runs may have no weights."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return, operator]


def _alone(model: nn.Module, row: Row) -> Tensor:
    """(T,) log-probabilities of a row's tokens by the model's own forward."""
    prompt, completion = row.prompt.input_ids, torch.from_numpy(row.token_ids).long()
    device = _device(model)
    completion = completion.to(device)
    ids = torch.cat([prompt.to(device), completion])[None]
    # A text model places tokens by itself; one with media would remember where it placed them.
    axes = len(row.prompt.position_ids)
    places = torch.arange(ids.shape[1], device=device)
    positions = {"position_ids": places.expand(axes, 1, -1)}
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=False,
        **(positions if axes > 1 else {}),
    )
    logits = output.logits[0, len(prompt) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(1, completion[:, None])[:, 0]
