"""A model's tensors under the names and in the layout of its published checkpoint, both ways.

transformers renames and reshapes tensors while it loads them: it strips ``thinker.``, moves
``visual.``, stacks the experts of a layer. ``NameMap`` follows each tensor of a checkpoint through
transformers' own weight converters, and takes the way back for publication and export. What a
checkpoint holds is what its index says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avatar_rl.buffer_service.weights.receiver import is_trained
from avatar_rl.common.errors import ModelError
from avatar_rl.common.weight_files import TensorHeader, WeightFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

#: Tensors are handed on in parts of about this size, whole layers each.
PART_BYTES = 256 << 20
_LAYER = re.compile(r"(.*?\.\d+)\.")


def checkpoint_names(path: Path) -> set[str]:
    """Tensor names of a safetensors checkpoint, sharded or not, read from the headers only.

    Raises ModelError as ``WeightFiles.find`` does."""
    return set(WeightFiles.find(path).tensors)


@dataclass(frozen=True)
class Group:
    """Tensors of the model that a converter made of tensors of the checkpoint; mostly one of
    one."""

    ours: tuple[str, ...]
    published: dict[str, TensorHeader]
    convert: Conversion | None = None  # None: the same tensor under another name

    def publish(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published tensors of ours, by name; views where the layout allows."""
        if self.convert is None:
            [ours], [name] = self.ours, self.published
            return {name: weights[ours]}
        return self.convert.publish({name: weights[name] for name in self.ours}, self.published)


class NameMap:
    """The map between a model's tensors and its published checkpoint, whose layout is kept."""

    def __init__(self, groups: Iterable[Group], shapes: Mapping[str, Tensor]) -> None:
        """``shapes``: our tensors, or tensors on the meta device like them."""
        dtypes = {name: tensor.dtype for name, tensor in shapes.items()}
        self._take(_parts(groups, shapes), dtypes)

    def _take(self, by_part: list[list[Group]], dtypes: Mapping[str, torch.dtype]) -> None:
        self._by_part, self._dtypes = by_part, dtypes
        #: Our names in the order of publication, part by part; whole layers each.
        self.parts: tuple[tuple[str, ...], ...] = tuple(
            tuple(dict.fromkeys(name for group in part for name in group.ours))
            for part in self._by_part
        )
        #: Published tensors of each part, on the meta device, in our dtypes.
        self.layouts: list[dict[str, Tensor]] = [
            {
                name: torch.empty(header.shape, dtype=dtypes[group.ours[0]], device="meta")
                for group in part
                for name, header in group.published.items()
            }
            for part in by_part
        ]
        #: All of them, in the same order.
        self.layout = {name: tensor for part in self.layouts for name, tensor in part.items()}

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> NameMap:
        """The map of a model that transformers loaded from ``folder``, before anything wraps it.

        Raises ModelError for a tensor of the checkpoint that is none of the model's, or of the
        model that is none of the checkpoint's, and for experts in an unknown layout.
        """
        tracer = _Tracer(model, folder)
        return cls(tracer.groups(), {name: _whole(t) for name, t in tracer.state.items()})

    def split(self, names: Collection[str]) -> tuple[NameMap, NameMap]:
        """Two maps: of the tensors made of any of ``names`` (ours), and of all others."""
        maps = []
        for wanted in (True, False):
            chosen = (
                [g for g in part if wanted == any(name in names for name in g.ours)]
                for part in self._by_part
            )
            maps.append(NameMap.__new__(NameMap))
            maps[-1]._take([part for part in chosen if part], self._dtypes)
        return maps[0], maps[1]

    @property
    def renames(self) -> dict[str, str] | None:
        """Published names by ours, where a name is all that differs; None where a tensor does."""
        groups = [group for part in self._by_part for group in part]
        if any(group.convert is not None for group in groups):
            return None
        return {group.ours[0]: next(iter(group.published)) for group in groups}

    def published_name(self, ours: str) -> str:
        """The one published name of a tensor. Raises ModelError where several make it."""
        found = self._plain.get(ours)
        if found is None:
            raise ModelError(
                f"{ours!r} has no published tensor of its own: it cannot have an adapter"
            )
        return found

    @cached_property
    def _plain(self) -> dict[str, str]:
        """Published names by ours, of tensors that are published as they are: an adapter's are
        looked up with every version."""
        groups = [group for part in self._by_part for group in part if group.convert is None]
        # the first of several, as publication goes
        return {group.ours[0]: next(iter(group.published)) for group in reversed(groups)}

    @torch.no_grad()
    def publish(self, weights: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Published tensors, part by part, of ``weights``: our tensors in the order of
        ``parts``."""
        for groups, part in zip(self._by_part, weights, strict=True):
            published: dict[str, Tensor] = {}
            for group in groups:
                published |= group.publish(part)
            yield published


@dataclass
class Conversion:
    """A weight converter of transformers, for the tensors of one layer."""

    converter: WeightConverter
    config: PretrainedConfig
    #: The name that the reversed converter gives a published tensor, and that tensor's name.
    found: dict[str, str] = field(default_factory=dict)

    def publish(
        self, weights: Mapping[str, Tensor], headers: Mapping[str, TensorHeader]
    ) -> dict[str, Tensor]:
        """Undo the conversion. Raises ModelError where names or shapes come out otherwise."""
        reverse: WeightConverter = self.converter.reverse_transform()  # type: ignore[assignment]
        target = ""
        for name, tensor in weights.items():
            renamed, pattern = reverse.rename_source_key(name)
            if pattern is None:
                raise ModelError(f"{name!r} does not lead back through {reverse!r}")
            target = target or renamed
            reverse.add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
        made = reverse.convert(target, config=self.config)
        published = {
            self.found.get(name, name): value[0] if isinstance(value, list) else value
            for name, value in made.items()
        }
        if published.keys() != headers.keys() or any(
            published[name].numel() != header.numel() for name, header in headers.items()
        ):
            raise ModelError(
                f"tensor {min(weights)!r} is made of {sorted(headers)[:2]}... by "
                f"{self.converter!r} and does not lead back to them: use a checkpoint of "
                "a supported model"
            )
        return {name: published[name].reshape(header.shape) for name, header in headers.items()}


class Transposed(Conversion):
    """Experts that are published with their last two axes the other way round.

    transformers decides by the shape whether to turn them when it loads, and never turns them back
    when it saves."""

    def publish(
        self, weights: Mapping[str, Tensor], headers: Mapping[str, TensorHeader]
    ) -> dict[str, Tensor]:
        [tensor], [name] = weights.values(), headers
        return {name: tensor.transpose(1, 2)}


class _Tracer:
    """Follows the tensors of a checkpoint into a model."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        pretrained: PreTrainedModel = model  # type: ignore[assignment]
        conversions = get_model_conversion_mapping(pretrained)
        self.renamings: list[WeightRenaming] = [
            c for c in conversions if isinstance(c, WeightRenaming)
        ]
        self.converters: list[WeightConverter] = [
            c for c in conversions if isinstance(c, WeightConverter)
        ]
        self.by_pattern = {p: c for c in self.converters for p in c.source_patterns}
        self.config, self.prefix = pretrained.config, pretrained.base_model_prefix
        self.folder = folder
        #: The tensors themselves, so that one under two names is known.
        self.state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self.undecided: list[str] = []  # converted by shape, and the shape did not tell
        self.headers = {
            name: header
            for name, header in WeightFiles.find(folder).headers().items()
            if is_trained(name)
        }

    def groups(self) -> list[Group]:
        """Every tensor of the checkpoint in one group. Raises ModelError."""
        from transformers.core_model_loading import dot_natural_key

        made: dict[str, tuple[str | None, list[str]]] = {}  # target: pattern, published names
        strangers = []
        for name in sorted(self.headers, key=dot_natural_key):
            target, pattern = self._rename(name)
            if target not in self.state:
                strangers.append(name)
                continue
            made.setdefault(target, (pattern, []))[1].append(name)
        groups = [self._group(target, *found) for target, found in made.items()]
        self._check_left(strangers, {name for group in groups for name in group.ours})
        if self.undecided:
            self._refuse_layout(sum(isinstance(g.convert, Transposed) for g in groups))
        self._check_tied()
        return groups

    def _rename(self, name: str, *, convert: bool = True) -> tuple[str, str | None]:
        """The model's name for a published one, and the converter's pattern that matched it, as
        transformers' loader finds them."""
        from transformers.core_model_loading import rename_source_key

        converters = self.converters if convert else []
        found = rename_source_key(name, self.renamings, converters, self.prefix, self.state)
        if found[0] not in self.state and name in self.state:
            return rename_source_key(name, [], [], self.prefix, self.state)
        return found

    def _group(self, target: str, pattern: str | None, names: list[str]) -> Group:
        headers = {name: self.headers[name] for name in names}
        if pattern is None:
            [(name, header)] = list(headers.items())[:1]
            if len(names) > 1 or header.shape != _shape(self.state[target]):
                raise ModelError(
                    f"model folder {self.folder}: {sorted(names)[:2]} {header.shape} do not make "
                    f"the model's {target!r} {_shape(self.state[target])}: config and checkpoint "
                    "are of different models, copy both again; or " + self._layout_hint(names)
                )
            return Group((target,), headers)
        from transformers.core_model_loading import Transpose

        converter = self.by_pattern[pattern]
        checked = [getattr(step, "check_dims", False) for step in converter.operations]
        if any(checked):
            if len(checked) > 1 or not isinstance(converter.operations[0], Transpose):
                raise ModelError(f"{target!r}: converter {converter!r} is not known here")
            if headers[names[0]].shape == _shape(self.state[target]):
                self.undecided.append(names[0])
            return Group((target,), headers, Transposed(converter, self.config))
        bare: dict[str, str] = {}
        for name in names:  # what the way back calls it: with and without the model's prefix
            inner = self._rename(name, convert=False)[0]
            variants = (inner, f"{self.prefix}.{inner}", inner.removeprefix(f"{self.prefix}."))
            bare |= dict.fromkeys(variants, name)
        group = Group(
            self._ours(converter, target, names), headers, Conversion(converter, self.config, bare)
        )
        self._prove(group)
        return group

    def _ours(self, converter: WeightConverter, target: str, names: list[str]) -> tuple[str, ...]:
        """The model's tensors that the loader makes of ``names``."""
        forward = deepcopy(converter)
        for name in names:
            _, pattern = self._rename(name)
            assert pattern is not None
            tensor = torch.empty(self.headers[name].shape, device="meta")
            forward.add_tensor(target, name, pattern, tensor)  # type: ignore[arg-type]
        try:
            made = forward.convert(target, config=self.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ModelError(
                f"model folder {self.folder}: {names[0]!r} and its like do not make the model's "
                f"{target!r} ({error}): " + self._layout_hint(names)
            ) from error
        for name, value in made.items():
            shape = tuple((value[0] if isinstance(value, list) else value).shape)
            if name not in self.state or shape != _shape(self.state[name]):
                raise ModelError(
                    f"model folder {self.folder}: {names[0]!r} and its like make {name!r} {shape}, "
                    "which the model does not have: " + self._layout_hint(names)
                )
        return tuple(made)

    def _prove(self, group: Group) -> None:
        """The way back leads to the published names and shapes. Raises ModelError."""
        group.publish({name: _whole(self.state[name]) for name in group.ours})

    def _check_left(self, strangers: list[str], covered: set[str]) -> None:
        """Nothing of checkpoint or model is left over, but for other names of the same tensor and
        for tables that are computed."""
        known = {id(self.state[name]) for name in covered}
        missing = [
            name
            for name, tensor in self.state.items()
            if isinstance(tensor, nn.Parameter) and id(tensor) not in known
        ]
        if missing:
            raise ModelError(
                f"parameter {min(missing)!r} has no counterpart in the base checkpoint "
                f"{self.folder}: the folder is of another model, or "
                + self._layout_hint([*strangers, *missing])
            )
        if strangers:
            raise ModelError(
                f"{len(strangers)} tensors of the base checkpoint {self.folder} (first "
                f"{min(strangers)!r}) are no parameters of the loaded model: rollout and learner "
                "would differ; " + self._layout_hint(strangers)
            )

    def _layout_hint(self, names: Iterable[str]) -> str:
        if not any("expert" in name for name in names):
            return "use a checkpoint of a supported model"
        known = sorted({p for c in self.converters for p in c.source_patterns if "expert" in p})
        return (
            "its experts lie in an unknown layout"
            + (f" (known: {', '.join(known)})" if known else "")
            + ": use the checkpoint as it was published"
        )

    def _check_tied(self) -> None:
        """A head that the config ties to the embeddings must be them: engines look at the config
        only."""
        head = self.state.get("lm_head.weight")
        names = [name for name in self.state if name.endswith("embed_tokens.weight")]
        tied = [
            getattr(config, "tie_word_embeddings", False)  # both must say so: defaults differ
            for config in (self.config, self.config.get_text_config())
        ]
        if head is None or not names or not all(tied):
            return
        if all(self.state[name] is not head for name in names):
            raise ModelError(
                f"model folder {self.folder}: its config ties the head to the embeddings "
                "(tie_word_embeddings), its checkpoint holds another head, which an engine would "
                "not use: correct the config, or remove lm_head.weight from the checkpoint"
            )

    def _refuse_layout(self, converted: int) -> None:
        """Raises ModelError for layouts that transformers or the engine would read otherwise."""
        name = min(self.undecided)
        raise ModelError(
            f"model folder {self.folder}: {name!r} {self.headers[name].shape}: its experts lie in "
            "an unknown layout"
            + (
                ", as save_pretrained writes them, which engines do not read: swap the last two "
                "axes of all its kind, or use the published checkpoint"
                if len(self.undecided) == converted
                else ": they are square, and transformers would read them the wrong way round; "
                "use a model of other sizes"
            )
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Of the whole tensor, also of one that ZeRO 3 has split already."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _whole(tensor: Tensor) -> Tensor:
    """One like it, whole, on the meta device."""
    return torch.empty(_shape(tensor), dtype=tensor.dtype, device="meta")


def _parts(groups: Iterable[Group], shapes: Mapping[str, Tensor]) -> list[list[Group]]:
    """Groups of one layer together, and small layers with their neighbours, in order."""
    layers: dict[str, list[Group]] = {}
    for group in groups:
        match = _LAYER.match(group.ours[0])
        layers.setdefault(match[1] if match else group.ours[0], []).append(group)
    parts: list[list[Group]] = []
    room = 0
    for layer in layers.values():
        size = sum(shapes[name].nbytes for group in layer for name in group.ours)
        if size > room:
            parts.append([])
            room = PART_BYTES
        parts[-1] += layer
        room -= size
    return parts
