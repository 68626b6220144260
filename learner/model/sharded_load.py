"""Loading a model in shares: under ZeRO 3 a rank holds its part of the weights and one module's,
never the whole model.

The model is made without weights. Then module by module rank 0 reads the tensors, DeepSpeed sends
them round, and each rank keeps its part."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avatar_rl.common.errors import ModelError
from avatar_rl.common.process import trim_heap
from avatar_rl.common.types import JsonObject
from avatar_rl.common.weight_files import WeightFiles
from avatar_rl.learner.model.check import check_layers, check_scores
from avatar_rl.learner.model.load import DTYPES, class_name, load_model, read_config
from avatar_rl.learner.model.names import NameMap

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

#: Of the model that is tried in place of the whole one.
TRIED_LAYERS, TRIED_VOCABULARY = 2, 1024


def load_in_shares(path: Path, *, dtype: str, deepspeed_config: JsonObject) -> nn.Module:
    """The model of a folder as ``load_model`` gives it, its parameters split over the ranks by
    ZeRO 3. Collective. Where a checkpoint packs tensors in another way than the model (mixtures of
    experts), every rank loads all of it first.

    Raises ModelError as ``load_model`` does.
    """
    import deepspeed
    import transformers

    kind = read_config(path)
    config = transformers.AutoConfig.from_pretrained(path)
    config = getattr(config, "thinker_config", config)
    files = WeightFiles.find(path)
    model = _blank(kind, config, dtype)
    names = NameMap.of(model, path).renames
    if names is None:
        log.info("%s packs tensors in another way: every rank loads the whole model at first", path)
        return load_model(path, dtype=dtype)
    check_layers(model.config, kind)
    _try_small(kind, config, dtype)
    _check_shapes(files, names, model)
    reader = _Reader(files, model)
    made: dict[Tensor, nn.Parameter] = {}  # by the blank: what is tied stays so
    # Children first: DeepSpeed splits all parameters below a module that are not split yet.
    for prefix, module in reversed(list(model.named_modules())):
        for name, blank in list(module._parameters.items()):
            if blank is None:
                continue
            if blank not in made:
                whole = f"{prefix}.{name}" if prefix else name
                # A tied head has no name of its own; it comes before what it is tied to.
                published = names.get(whole) or names[_twin(model, blank, names)]
                made[blank] = nn.Parameter(reader.read(published, blank))
            module._parameters[name] = made[blank]
        if module._parameters:
            deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config)
    model.config.use_cache = False
    return model.eval()


def _blank(kind: str, config: PretrainedConfig, dtype: str) -> Any:
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


def _twin(model: nn.Module, blank: Tensor, names: Mapping[str, str]) -> str:
    """Another name of the same parameter, one that the checkpoint has."""
    return next(
        name
        for name, one in model.named_parameters(remove_duplicate=False)
        if one is blank and name in names
    )


def _try_small(kind: str, config: PretrainedConfig, dtype: str) -> None:
    """``check_scores`` on a few layers of the same architecture with random weights.

    Whether a model's log-probabilities are its own depends on its code, not on its weights.
    """
    import transformers

    small = deepcopy(config)
    text: Any = small.get_text_config()
    types = getattr(text, "layer_types", None) or [""]
    layers = max(TRIED_LAYERS, *(types.index(one) + 1 for one in set(types)))
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = list(types)[: text.num_hidden_layers]
    text.vocab_size = min(TRIED_VOCABULARY, text.vocab_size)
    for one in (small, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if hasattr(one, name):
                setattr(one, name, None)
    maker = getattr(transformers, class_name(kind))
    make = getattr(maker, "_from_config", None) or maker.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(small, dtype=DTYPES[dtype])
    check_scores(model.eval(), kind)
    del model
    trim_heap()  # else the shares would come on top of it


def _check_shapes(files: WeightFiles, names: Mapping[str, str], model: nn.Module) -> None:
    """On every rank, from the headers: an error of one rank alone would leave the others waiting.

    Raises ModelError for the first tensor that the model wants in another shape.
    """
    from safetensors import safe_open

    wanted = {names[name]: p.shape for name, p in model.named_parameters() if name in names}
    for file, held in files.by_file().items():
        with safe_open(file, framework="pt") as tensors:
            for name in held:
                shape = tuple(tensors.get_slice(name).get_shape())
                if name in wanted and shape != tuple(wanted[name]):
                    raise ModelError(
                        f"tensor {name!r} of {file} has the shape {shape}, the model wants "
                        f"{tuple(wanted[name])}: config and weights are of different models; copy "
                        "both again"
                    )


class _Reader:
    """Tensors of the checkpoint on rank 0. The others get room, which DeepSpeed fills from there:
    the same for one after the other, since rooms of their own would leave holes in the heap."""

    def __init__(self, files: WeightFiles, model: nn.Module) -> None:
        self._files, self._is_first = files, dist.get_rank() == 0
        sizes = [p.numel() * p.element_size() for p in model.parameters()]
        self._room = torch.empty(0 if self._is_first else max(sizes), dtype=torch.uint8)

    def read(self, name: str, blank: Tensor) -> Tensor:
        from safetensors import safe_open

        if not self._is_first:
            size = blank.numel() * blank.element_size()
            return self._room[:size].view(blank.dtype).view(blank.shape)
        with safe_open(self._files.tensors[name], framework="pt") as file:
            return file.get_tensor(name).to(blank.dtype)
