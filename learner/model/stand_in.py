"""Models in place of a checkpoint's own: one without weights, and a small one that is tried.

Whether a model's log-probabilities are its own (check.py) depends on its code, not on its weights.
So a few layers of the same architecture are tried where the whole model is held nowhere yet."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avatar_rl.common.process import trim_heap
from avatar_rl.learner.model.check import check_layers, check_scores
from avatar_rl.learner.model.kinds import DTYPES, class_name
from avatar_rl.learner.model.media import TOWERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Of the model that is tried; experts of a layer at least so many times those of a token.
LAYERS, VOCABULARY, EXPERTS = 2, 1024, 2
DEVIATION = 0.02  # of its weights


class SmallError(Exception):
    """A model type that cannot be made with few layers and experts."""


def blank_model(kind: str, config: PretrainedConfig, dtype: str) -> Any:
    """The model with its buffers, and parameters on the meta device."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    maker = getattr(transformers, class_name(kind))
    make = getattr(maker, "_from_config", None) or maker.from_config  # of an Auto class
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = make(config, dtype=DTYPES[dtype])
    model.tie_weights()
    return model


def try_small(kind: str, config: PretrainedConfig, dtype: str) -> None:
    """``check_layers`` and ``check_scores`` on a few layers with random weights. Its towers stay
    without any: nothing runs them.

    Raises ModelError as these do, and SmallError where there is no such model."""
    check_layers(config, kind)
    try:
        model = blank_model(kind, _small(config), dtype)
    except Exception as error:  # whatever a model says to a config that nobody has made it for
        raise SmallError(f"{type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(0)
    made: dict[Tensor, nn.Parameter] = {}  # by the blank: what is tied stays so
    towers = set(TOWERS.values())
    for prefix, module in model.named_modules():
        if not towers.isdisjoint(prefix.split(".")):
            continue
        for name, blank in list(module._parameters.items()):
            if blank is None:
                continue
            if blank not in made:
                made[blank] = nn.Parameter(_drawn(name, blank, generator))
            module._parameters[name] = made[blank]
    check_scores(model.eval(), kind)
    del model, made
    trim_heap()  # else what is loaded would come on top of it


def _small(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with one layer of each kind, a small vocabulary and few experts."""
    small = deepcopy(config)
    text: Any = small.get_text_config()
    types = getattr(text, "layer_types", None) or [""]
    layers = max(LAYERS, *(types.index(one) + 1 for one in set(types)))
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = list(types)[: text.num_hidden_layers]
    text.vocab_size = min(VOCABULARY, text.vocab_size)
    for name in ("num_experts", "num_local_experts"):
        if isinstance(count := getattr(text, name, None), int):
            setattr(text, name, min(count, EXPERTS * getattr(text, "num_experts_per_tok", count)))
    for one in (small, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if hasattr(one, name):
                setattr(one, name, None)
    return small


def _drawn(name: str, blank: Tensor, generator: torch.Generator) -> Tensor:
    """Random matrices, norms that change nothing, no biases."""
    value = torch.zeros(blank.shape, dtype=blank.dtype)
    if blank.ndim > 1:
        return value.normal_(0.0, DEVIATION, generator=generator)
    return value + 1 if name == "weight" else value
