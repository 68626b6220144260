"""Loading a model in shares: under ZeRO 3 a rank holds its part of the weights and one module's,
never the whole model.

The model is made without weights. Then module by module rank 0 reads the tensors, DeepSpeed sends
them round, and each rank keeps its part."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avatar_rl.common.errors import ModelError
from avatar_rl.common.types import JsonObject
from avatar_rl.common.weight_files import WeightFiles
from avatar_rl.learner.model.check import check_layers
from avatar_rl.learner.model.kinds import model_config, read_config
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.names import NameMap
from avatar_rl.learner.model.stand_in import SmallError, blank_model, try_small

log = logging.getLogger(__name__)


class NoSharesError(ModelError):
    """A model of this type can only be loaded whole."""


def load_in_shares(path: Path, *, dtype: str, deepspeed_config: JsonObject) -> nn.Module:
    """The model of a folder as ``load_model`` gives it, its parameters split over the ranks by
    ZeRO 3. Collective. Where a checkpoint packs tensors in another way than the model (mixtures of
    experts), rank 0 loads all of it first.

    Raises ModelError as ``load_model`` does, NoSharesError on every rank.
    """
    import deepspeed

    kind, config = read_config(path), model_config(path)
    files = WeightFiles.find(path)
    model = blank_model(kind, config, dtype)
    names = NameMap.of(model, path).renames
    check_layers(model.config, kind)
    try:
        try_small(kind, config, dtype)
    except SmallError as error:
        raise NoSharesError(
            f"model type {kind!r} cannot be loaded in shares, since no small one can be tried in "
            f"its place ({error}): set learner.optimizer.zero_stage to 2"
        ) from error
    reader: _Reader
    if names is None:
        log.info("%s packs tensors in another way: rank 0 loads the whole model at first", path)
        reader = _ModelReader(path, dtype, model)
    else:
        _check_shapes(files, names, model)
        reader = _FileReader(files, names, model)
    made: dict[Tensor, nn.Parameter] = {}  # by the blank: what is tied stays so
    # Children first: DeepSpeed splits all parameters below a module that are not split yet.
    for prefix, module in reversed(list(model.named_modules())):
        for name, blank in list(module._parameters.items()):
            if blank is None:
                continue
            if blank not in made:
                whole = f"{prefix}.{name}" if prefix else name
                made[blank] = nn.Parameter(reader.read(whole, blank))
            module._parameters[name] = made[blank]
        if module._parameters:
            deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config)
    model.config.use_cache = False
    return model.eval()


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
    """Parameters of a blank model, by name. Rank 0 has them. The others get room, which DeepSpeed
    fills from there: the same for one after the other, since rooms of their own would leave holes
    in the heap."""

    def __init__(self, model: nn.Module) -> None:
        self._is_first = dist.get_rank() == 0
        sizes = [p.numel() * p.element_size() for p in model.parameters()]
        self._room = torch.empty(0 if self._is_first else max(sizes), dtype=torch.uint8)

    def read(self, name: str, blank: Tensor) -> Tensor:
        if self._is_first:
            return self._found(name, blank)
        size = blank.numel() * blank.element_size()
        return self._room[:size].view(blank.dtype).view(blank.shape)

    def _found(self, name: str, blank: Tensor) -> Tensor:
        raise NotImplementedError


class _FileReader(_Reader):
    """From the checkpoint's files, whose tensors have the model's names, or others."""

    def __init__(self, files: WeightFiles, names: Mapping[str, str], model: nn.Module) -> None:
        super().__init__(model)
        self._files, self._names, self._model = files, names, model

    def _found(self, name: str, blank: Tensor) -> Tensor:
        from safetensors import safe_open

        # A tied head has no name of its own; it comes before what it is tied to.
        published = self._names.get(name) or self._names[self._twin(blank)]
        with safe_open(self._files.tensors[published], framework="pt") as file:
            return file.get_tensor(published).to(blank.dtype)

    def _twin(self, blank: Tensor) -> str:
        """Another name of the same parameter, one that the checkpoint has."""
        return next(
            name
            for name, one in self._model.named_parameters(remove_duplicate=False)
            if one is blank and name in self._names
        )


class _ModelReader(_Reader):
    """From the whole model, which rank 0 loads, and lets go of as it is read.

    Raises on every rank what the load raises there: a rank that waited would do so for hours."""

    def __init__(self, path: Path, dtype: str, model: nn.Module) -> None:
        super().__init__(model)
        self._held: dict[str, Tensor] = {}
        failure: list[ModelError | None] = [None]
        if self._is_first:
            try:
                whole = load_model(path, dtype=dtype)
                self._held = dict(whole.named_parameters(remove_duplicate=False))
            except ModelError as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]

    def _found(self, name: str, blank: Tensor) -> Tensor:
        return self._held.pop(name).detach()
