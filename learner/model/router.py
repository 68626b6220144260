"""Routers of mixture-of-experts layers: which experts a token takes, and how training moves that.

A router that is trained with everything else drifts: engine and learner then send tokens to other
experts where two are nearly tied, and log-probabilities part. So it is frozen unless asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avatar_rl.common.errors import ConfigError, ModelError
from avatar_rl.learner.config import RouterMode


class Routers:
    """The routers of one model.

    ``frozen``: their weights stay. ``trained``: they learn with the rest. ``balanced``: so they do,
    with the auxiliary loss of the Switch Transformer (arXiv:2101.03961, section 2.2) over the top
    k, as transformers computes it.
    """

    def __init__(self, model: nn.Module, mode: RouterMode, balance: float) -> None:
        self.balance = balance if mode == "balanced" else 0.0
        #: Logits (tokens, experts) of every router in the forwards since the last loss, and k.
        self._logits: list[tuple[Tensor, int]] = []
        self._open = True  # closed while a backward computes activations anew
        routers = list(_routers(model))
        if mode == "balanced" and not routers:
            raise ConfigError(
                "learner.router is balanced, but the model has no mixture of experts: leave it out"
            )
        for router in routers:
            if mode == "frozen":
                router.requires_grad_(False)
            elif mode == "balanced":
                if not hasattr(router, "top_k"):
                    raise ModelError(
                        f"router {type(router).__name__} does not say how many experts a token "
                        "takes: set learner.router to frozen or trained"
                    )
                router.register_forward_hook(self._note)
        for module in model.modules():
            # What runs the layers: the policy calls it past the model's own forward.
            if isinstance(getattr(module, "layers", None), nn.ModuleList):
                module.register_forward_pre_hook(self._begin)

    def _begin(self, module: nn.Module, inputs: object) -> None:
        self._open = True

    def _note(self, router: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
        if self._open and torch.is_grad_enabled():
            self._logits.append((output[0], int(router.top_k)))  # type: ignore[arg-type]

    def loss(self) -> Tensor | float:
        """Of the forwards since the last call: ``balance`` times the mean over their layers of
        experts x sum(share of tokens x mean probability). The mean is k where all experts are taken
        alike."""
        self._open = False
        if not self._logits:
            return 0.0
        layers = []
        for logits, top_k in self._logits:
            probabilities = logits.float().softmax(-1)
            taken = torch.zeros_like(probabilities)
            taken.scatter_(1, probabilities.topk(top_k, -1).indices, 1.0)
            layers.append(logits.shape[1] * (taken.mean(0) * probabilities.mean(0)).sum())
        self._logits = []
        return self.balance * torch.stack(layers).mean()


def _routers(model: nn.Module) -> list[nn.Module]:
    """What chooses between experts: ``gate`` or ``router`` beside ``experts``."""
    found = []
    for module in model.modules():
        parts = dict(module.named_children())
        if "experts" in parts:
            found += [parts[name] for name in ("gate", "router") if name in parts]
    return found
