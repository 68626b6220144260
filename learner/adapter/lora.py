"""LoRA layers in a model: put there by PEFT, switched off for the reference policy, and merged into
the weights that are published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avatar_rl.learner.adapter.targets import choose, part_of
from avatar_rl.learner.lora_config import LoraConfig

if TYPE_CHECKING:
    import peft
    from peft.tuners.lora import LoraLayer

#: The name under which PEFT keeps our adapter.
NAME = "default"
_A, _B, _BASE = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight", ".base_layer."


def base_name(name: str) -> str | None:
    """The name that a parameter had before its layer got an adapter; None for the adapter's own."""
    return None if ".lora_" in name else name.replace(_BASE, ".")


def merged_name(name: str) -> str:
    """The weight that a parameter goes into when the adapters are merged."""
    plain = base_name(name)
    return plain if plain is not None else name.partition(".lora_")[0] + ".weight"


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the model's linear layers by name."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


class Adapter:
    """The LoRA layers of one model (https://arxiv.org/abs/2106.09685): y = W x + s B A x with W
    frozen, A (rank, inputs) random and B (outputs, rank) zero at first, s = ``config.scaling``.

    The layers have the dtype of their base. In bfloat16 the optimiser keeps float32 masters of A
    and B, as it does of any weight.
    """

    def __init__(
        self, config: LoraConfig, settings: peft.LoraConfig, layers: dict[str, LoraLayer]
    ) -> None:
        self.config, self.settings, self.layers = config, settings, layers

    @classmethod
    def attach(
        cls, model: nn.Module, config: LoraConfig, *, seed: int = 0, key: str = "learner.lora"
    ) -> Adapter:
        """Put adapters into ``model``, in place. Equal seeds give equal adapters.

        Raises ConfigError as ``choose`` does.
        """
        names = choose(linear_shapes(model), config, key=key)  # before PEFT is imported: 1 s
        import peft
        from peft.tuners.lora import LoraLayer

        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # a factor, in whole numbers or not
            lora_dropout=config.dropout,
            target_modules=names,
            use_rslora=config.rslora,
            bias="none",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, model, adapter_name=NAME)
        layers = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        assert sorted(layers) == sorted(names)
        adapter = cls(config, settings, layers)
        adapter.drop(active=False)
        return adapter

    def summary(self) -> str:
        """What is trained, in words."""
        parts = Counter(part_of(name) for name in self.layers)
        where = ", ".join(f"{count} {part}" for part, count in parts.items())
        weights = [
            getattr(layer, f"lora_{side}")[NAME].weight
            for layer in self.layers.values()
            for side in "AB"
        ]
        # Under ZeRO 3 a weight has moved to where its rank keeps it.
        trained = sum(int(getattr(w, "ds_numel", w.numel())) for w in weights if w.requires_grad)
        return f"rank {self.config.rank} on {where} layers: {trained:,} parameters train"

    def freeze_base(self, policy: nn.Module) -> int:
        """Switch gradients off for all but the adapter; parameters that still train."""
        trained = 0
        for name, parameter in policy.named_parameters():
            if base_name(name) is not None:
                parameter.requires_grad_(False)
            trained += parameter.numel() if parameter.requires_grad else 0
        return trained

    def drop(self, *, active: bool) -> None:
        """Dropout before the adapters on, for training passes, or off. The rest of the model never
        has any."""
        for layer in self.layers.values():
            layer.lora_dropout[NAME].train(active)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is its base within the block."""
        self._switch(off=True)
        try:
            yield
        finally:
            self._switch(off=False)

    def _switch(self, *, off: bool) -> None:
        # Not `enable_adapters`: it also takes the parameters out of the gradient's way, and
        # DeepSpeed has its hooks on them.
        for layer in self.layers.values():
            layer._disable_adapters = off

    def merged(self, weights: Mapping[str, Tensor]) -> MergedWeights:
        """``weights``, a model's own by name, as those of a model without adapters."""
        return MergedWeights(weights, self.config.scaling)

    def tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's own of ``weights``, by layer and side: ``<layer>.lora_A.weight``."""
        return {
            name.replace(f".{NAME}.", "."): weight
            for name, weight in weights.items()
            if base_name(name) is None
        }


class MergedWeights(Mapping[str, Tensor]):
    """Weights with their adapters added, under the names of a model without adapters.

    A tensor is merged when it is asked for, so that only one is held beside the model: W + s B A in
    float32 (float64 of a float64 model), then cast to W's dtype once. Nothing is written to the
    training weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], scaling: float) -> None:
        self.scaling = scaling
        self._base: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, weight in weights.items():
            if (plain := base_name(name)) is not None:
                self._base[plain] = weight
            elif name.endswith(_A):
                layer = name.removesuffix(_A)
                self._pairs[f"{layer}.weight"] = (weight, weights[layer + _B])

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        pair = self._pairs.get(name)
        return weight if pair is None else merge(weight, *pair, self.scaling)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


@torch.no_grad()
def merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + s B A of W (outputs, inputs), computed in float32 at least and cast to W's dtype once."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    delta = b.to(exact) @ a.to(exact)
    return weight.to(exact).add(delta, alpha=scaling).to(weight.dtype)
