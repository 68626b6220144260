"""Routers of mixture-of-experts layers: which experts a token takes, and how training moves that.

A router that is trained with everything else drifts: engine and learner then send tokens to other
experts where two are nearly tied, and log-probabilities part. So it is frozen unless asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from avatar_rl.common.errors import ConfigError, ModelError
from avatar_rl.learner.config import RouterMode

#: Of what a router returns: its logits (tokens, experts), and of the experts that a token takes
#: their weights and numbers, both (tokens, k).
Output = tuple[Tensor, Tensor, Tensor]
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Routers:
    """The routers of one model.

    ``frozen``: their weights stay. ``trained``: they learn with the rest. ``balanced``: so they do,
    with the auxiliary loss of the Switch Transformer (arXiv:2101.03961, section 2.2) over the top
    k, as transformers computes it. ``replay``: so they do, and completions take the experts that
    they took in the engine (arXiv:2510.11370). The weights of these experts are the learner's own,
    so gradients reach the router.
    """

    def __init__(self, model: nn.Module, mode: RouterMode, balance: float) -> None:
        self.balance = balance if mode == "balanced" else 0.0
        #: Logits (tokens, experts) of every router in the forwards since the last loss, and k.
        self._logits: list[tuple[Tensor, int]] = []
        self._open = True  # closed while a backward computes activations anew
        self._given: Tensor | None = None  # (tokens, layers, k); the backward reads it again
        #: By router that was looked at, whether the weights of a token's experts add up to 1.
        self._summed: dict[str, bool] = {}
        routers = dict(_routers(model))
        if mode in ("balanced", "replay") and not routers:
            raise ConfigError(
                f"learner.router is {mode}, but the model has no mixture of experts: leave it out"
            )
        for name, router in routers.items():
            if mode == "frozen":
                router.requires_grad_(False)
            elif mode == "balanced":
                _top_k(router)
                router.register_forward_hook(self._note)
            elif mode == "replay":
                hook = partial(self._replayed, name, _layer(name), _top_k(router))
                router.register_forward_hook(hook)
        for module in model.modules():
            # What runs the layers: the policy calls it past the model's own forward.
            if isinstance(getattr(module, "layers", None), nn.ModuleList):
                module.register_forward_pre_hook(self._begin)

    def _begin(self, module: nn.Module, inputs: object) -> None:
        self._open = True

    def _note(self, router: nn.Module, inputs: object, output: Output) -> None:
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

    def replay(self, experts: Tensor | None) -> None:
        """What the tokens of the next forward take, and of its backward: (tokens, layers, k),
        negative for their own choice; None where all choose. Other modes than replay take no
        notice."""
        self._given = experts

    def _replayed(
        self, name: str, layer: int, k: int, router: nn.Module, inputs: object, output: Output
    ) -> Output | None:
        """What ``router`` returns of the experts that are given."""
        if self._given is None:
            return None
        logits, own, chosen = output
        if name not in self._summed:
            self._summed[name] = _sums_to_one(name, output)
        if layer >= self._given.shape[1] or self._given.shape[2] != k:
            raise ModelError(
                f"router {name} is of layer {layer} and takes {k} experts, the trajectories have "
                f"{self._given.shape[1]} layers with {self._given.shape[2]}: they are of another "
                "model; start from an empty buffer"
            )
        given = self._given[:, layer].long()
        replayed = (given >= 0).all(-1, keepdim=True)
        experts = torch.where(replayed, given, chosen)
        weights = _weights(logits, experts, summed=self._summed[name]).to(own.dtype)
        return logits, torch.where(replayed, weights, own), experts


def _weights(logits: Tensor, experts: Tensor, *, summed: bool) -> Tensor:
    """(tokens, k) probabilities of ``experts``, with ``summed`` over their sum, in float32."""
    found = logits.float().softmax(-1).gather(1, experts)
    return found / found.sum(-1, keepdim=True) if summed else found


@torch.no_grad()
def _sums_to_one(name: str, output: Output) -> bool:
    """Whether a router's weights of a token's experts add up to 1. Raises ModelError for one that
    makes them otherwise than ``_weights``."""
    logits, own, chosen = output
    tolerance = 1e-5 if own.dtype in (torch.float32, torch.float64) else 1e-2
    for summed in (True, False) if own.shape == chosen.shape else ():
        if torch.allclose(
            _weights(logits, chosen, summed=summed).to(own), own, rtol=0, atol=tolerance
        ):
            return summed
    raise ModelError(
        f"router {name} weighs its experts otherwise than by a softmax over all of them: set "
        "learner.router to frozen or trained"
    )


def _top_k(router: nn.Module) -> int:
    if not hasattr(router, "top_k"):
        raise ModelError(
            f"router {type(router).__name__} does not say how many experts a token takes: set "
            "learner.router to frozen or trained"
        )
    return int(router.top_k)  # type: ignore[arg-type]


def _layer(name: str) -> int:
    """The decoder layer that a module is of."""
    found = _LAYER.findall(name)
    if len(found) != 1:
        raise ModelError(
            f"router {name!r}: its layer cannot be told, set learner.router to frozen or trained"
        )
    return int(found[0])


def _routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What chooses between experts: ``gate`` or ``router`` beside ``experts``."""
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        if "experts" in parts:
            for part in ("gate", "router"):
                if part in parts:
                    yield f"{name}.{part}", parts[part]
