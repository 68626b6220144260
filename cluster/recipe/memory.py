"""The memory plan of a run: who holds what, in bytes, by arithmetic; nothing here is measured.

Dry run, doctor, preflight and the docs take their numbers from here. NCCL's buffers, CUDA graphs
and the allocator's gaps come on top: leave 10 GiB per GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from avatar_rl.actors.config import HELD_BYTES
from avatar_rl.cluster.adapter_road import takes_adapter
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.architecture import (
    ARCHITECTURES,
    SIGHT,
    SOUND,
    Architecture,
    Tower,
    architecture_of,
)
from avatar_rl.cluster.recipe.assets import checkpoint_folder
from avatar_rl.cluster.recipe.gpus import local_gpus
from avatar_rl.common.errors import AvatarError
from avatar_rl.learner.adapter.targets import LLM, PROJECTOR, part_of

GIB = 1 << 30
#: Bytes of a parameter, or of a number of its activations.
BFLOAT16, FLOAT32 = 2, 4
#: Bytes of AdamW for a parameter that trains: two moments in float32, and a master copy of weights
#: that are bfloat16.
MOMENTS, MASTER = 8, 4
BOARD_VERSIONS = 3  # two that the weight store keeps, and a new one before the older goes
#: Tokens whose logits are held at once; the log-prob head's own tile (a test compares them).
LOGIT_TILE = 512
PROCESS_BYTES = 3 << 29  # resident size of a vLLM or DeepSpeed process with a tiny model: 1.5 GiB
#: Of a GPU that two processes share: CUDA graphs, gaps of the allocators, what libraries keep.
SHARED_RESERVE = 4 * GIB
#: A media worker beside its towers: on the host, and of a GPU the CUDA context.
WORKER_BYTES, CONTEXT_BYTES = GIB, GIB >> 1
#: Tokens of an engine's step where nobody says; actors/engine/launch.py has it (a test compares).
BATCHED_TOKENS = 8192

Parts = Mapping[str, float]  # bytes by what holds them


@dataclass(frozen=True)
class LearnerSetting:
    """What a rank's memory depends on, beside the model."""

    ranks: int = 1
    zero_stage: int = 0
    offload: bool = False  # the optimiser's state in host memory
    reference: bool = True  # a second policy, split over the ranks whatever ZeRO does
    adapter_rank: int | None = None  # LoRA; its reference is the base itself
    targets: tuple[str, ...] = (LLM,)  # of LoRA
    frozen: tuple[str, ...] = (SIGHT, SOUND)  # towers whose own weights do not train
    number: int = BFLOAT16  # bytes of a weight
    gradient: int = BFLOAT16  # bytes of a gradient, where weights have no more
    pack_tokens: int = 0
    sequence: int = 1  # ranks that share a pack
    checkpointing: bool = False
    workers: int = 0  # media worker processes with towers of their own
    decoders: int = 0  # the same without towers: they make pixels
    own_towers: bool = False  # without them: towers apart from the policy's in the rank itself

    @classmethod
    def of(cls, config: RunConfig, model: Architecture, *, number: int) -> LearnerSetting:
        learner, optimizer = config.learner, config.learner.optimizer
        lora = learner.lora
        frozen = tuple(w for w in (SIGHT, SOUND) if lora is not None or w in optimizer.freeze)
        targets = () if lora is None else lora.targets
        trained = [t for t in model.towers if t.word not in frozen or _adapted(model, t, targets)]
        store, workers = learner.embeddings.mode, learner.embeddings.workers
        stored = model.encoders > 0 and not trained and store in ("auto", "on")
        # With GPUs, which this is for: where a tower trains, workers make its pixels.
        decoded = model.encoders > 0 and not stored and store in ("auto", "pixels")
        return cls(
            ranks=learner.ranks,
            zero_stage=optimizer.zero_stage,
            offload=optimizer.offload_optimizer,
            reference=learner.objective.beta > 0
            and (lora is None or config.model.reference is not None),
            adapter_rank=None if lora is None else lora.rank,
            targets=targets,
            frozen=frozen,
            number=number,
            gradient=FLOAT32 if optimizer.accumulate_in_float32 else BFLOAT16,
            pack_tokens=config.pack_tokens,
            sequence=learner.sequence_parallel,
            checkpointing=learner.gradient_checkpointing,
            workers=workers if stored else 0,
            decoders=workers if decoded else 0,
            own_towers=stored and not workers,
        )

    def split(self, stage: int) -> float:
        """Share of a rank in what ZeRO splits from ``stage`` on."""
        return 1 / self.ranks if self.zero_stage >= stage else 1.0

    def trained(self, model: Architecture) -> float:
        """Parameters that train."""
        if self.adapter_rank is not None:
            return model.adapter(self.adapter_rank, self.targets)
        return model.decoder + sum(t.parameters for t in model.towers if t.word not in self.frozen)


def optimizer_bytes(model: Architecture, setting: LearnerSetting) -> float:
    """AdamW's state of all ranks together."""
    master = MASTER if setting.number < FLOAT32 else 0
    return setting.trained(model) * (MOMENTS + master)


def activation_bytes(
    model: Architecture, tokens: int, *, number: int = BFLOAT16, checkpointing: bool = False
) -> float:
    """What the backward pass needs of the decoder's forward over one pack.

    A layer keeps its two normed inputs (also in float32), queries, keys and values before and
    after rotation, the attention's result and four products of the MLP. With checkpointing a layer
    keeps its input only; one layer at a time is computed again.
    """
    hidden, heads = model.hidden, model.queries + model.keys
    attention = 2 * hidden + 2 * heads + model.keys + model.queries
    active = model.active_experts if model.experts > 1 else 1
    inside = tokens * (
        number * (attention + 2 * hidden + 4 * active * model.mlp) + 2 * FLOAT32 * hidden
    )
    inputs = model.layers * tokens * number * hidden
    return inputs + inside if checkpointing else model.layers * inside


def _adapted(model: Architecture, tower: Tower, targets: Sequence[str]) -> list[str]:
    """The tower's layers that have an adapter."""
    return [name for name in model.adapted(targets) if name in tower.linear]


def tower_activations(model: Architecture, setting: LearnerSetting) -> tuple[float, float]:
    """What the backward pass keeps of the towers' forward over a pack that is all media, and what
    computing one layer again takes besides, in bytes.

    A tower whose projector alone has an adapter runs without a graph: that keeps its own inputs. A
    position is either sight or sound, so the larger tower counts. Nothing is divided by the ranks
    that share the pack: each runs the towers."""
    kept, again = 0.0, 0.0
    for tower in model.towers:
        adapted = _adapted(model, tower, setting.targets) if setting.adapter_rank else []
        projector = [name for name in tower.linear if part_of(name) == PROJECTOR]
        if tower.word not in setting.frozen:
            trains, inputs = True, projector
        else:
            trains = any(part_of(name) != PROJECTOR for name in adapted)
            inputs = projector if trains else [name for name in adapted if name in projector]
        widths = sum(tower.linear[name][1] for name in inputs)
        ends = float(setting.pack_tokens * setting.number * widths)
        positions = setting.pack_tokens * tower.positions if trains else 0.0
        layer = positions * (setting.number * tower.numbers() + 2 * FLOAT32 * tower.hidden)
        ends += positions * tower.inputs * FLOAT32  # as the processor gives them
        if setting.checkpointing:
            kept = max(kept, ends + tower.layers * positions * setting.number * tower.hidden)
            again = max(again, layer)
        else:
            kept = max(kept, ends + tower.layers * layer)
    return kept, again


def learner_parts(model: Architecture, setting: LearnerSetting) -> dict[str, float]:
    """Bytes on one learner GPU (without GPUs, in a rank's memory), by part.

    ZeRO 1 splits the optimiser's state over the ranks, 2 the gradients too, 3 the weights too. A
    pack's activations and embeddings divide by the ranks that share it; in attention a rank has all
    positions of its share of the heads."""
    number, tokens = setting.number, -(-setting.pack_tokens // setting.sequence)
    optimizer = optimizer_bytes(model, setting) * setting.split(1)
    activations = activation_bytes(
        model, tokens, number=number, checkpointing=setting.checkpointing
    )
    logits = 2.0 * min(tokens, LOGIT_TILE) * model.vocabulary * FLOAT32
    if number < FLOAT32 and setting.adapter_rank is None:
        logits += model.vocabulary * model.hidden * FLOAT32  # sum of the head's gradient over tiles
    embeddings = float(tokens * model.hidden * number) if setting.workers else 0.0
    # Publication gathers a layer, or the table of words, when there are no activations any more.
    part = model.largest_part * number * (1 - setting.split(3))
    towers = model.encoders * number + CONTEXT_BYTES
    of_towers, again = tower_activations(model, setting)
    # They are computed again when the decoder's activations are gone.
    of_towers += max(0.0, again - activations)
    return {
        "weights": model.parameters * number * setting.split(3),
        "gradients": setting.trained(model) * max(number, setting.gradient) * setting.split(2),
        "optimiser": 0.0 if setting.offload else optimizer,
        "reference": model.parameters * number / setting.ranks if setting.reference else 0.0,
        "activations": activations,
        "towers' activations": of_towers,
        "logits": logits,
        "embeddings": embeddings,
        "publication beyond these": max(0.0, part - activations - logits - embeddings),
        "media workers": setting.workers * towers if number == BFLOAT16 else 0.0,
        "towers": model.encoders * number if setting.own_towers else 0.0,
    }


@dataclass(frozen=True)
class MemoryPlan:
    """What a recipe's run needs, in bytes."""

    config: RunConfig
    model: Architecture
    folder: Path | None = None  # where its checkpoint is, or would be

    @classmethod
    def of(cls, config: RunConfig | None) -> MemoryPlan | None:
        """None for the tiny model and for one whose size is not known."""
        path = None
        with suppress(AvatarError):  # an adapter without its base: the model's own finding says it
            path = checkpoint_folder(config) if config is not None else None
        model = architecture_of(str(path)) if path is not None else None
        return cls(config, model, path) if config is not None and model is not None else None

    @property
    def setting(self) -> LearnerSetting:
        """Of a learner with GPUs."""
        return LearnerSetting.of(self.config, self.model, number=BFLOAT16)

    @property
    def weights(self) -> float:
        return self.model.parameters * BFLOAT16

    @property
    def learner_parts(self) -> dict[str, float]:
        """Of one learner GPU."""
        return learner_parts(self.model, self.setting)

    @property
    def learner_gpu(self) -> float:
        """Of one learner GPU, all parts."""
        return sum(self.learner_parts.values())

    def train_flops(self, positions: float, scored: float, pairs: float) -> float:
        """Operations of what the learner computed, all ranks together."""
        frozen = self.setting.adapter_rank is not None
        return self.model.train_flops(positions, scored, pairs, frozen=frozen)

    @property
    def rollout_parts(self) -> dict[str, float]:
        """Of one rollout GPU: weights, and the cache of one longest completion."""
        engine = self.config.rollout.engine
        cache = self.model.cache_bytes(engine.max_model_len)
        share = engine.tensor_parallel_size
        return {"weights": self.weights / share, "keys and values": cache / share}

    @property
    def rollout_gpu(self) -> float:
        return sum(self.rollout_parts.values())

    @property
    def engine_cache(self) -> float:
        """Keys and values of a rollout engine, as the recipe names them; else one longest
        completion."""
        named = self.config.rollout.engine.kv_cache_memory_bytes
        return float(named) if named is not None else self.rollout_parts["keys and values"]

    @property
    def learner_stays(self) -> dict[str, float]:
        """Of a colocated rank, what lies on its GPU between two steps."""
        parts = self.learner_parts
        names = ("weights", "gradients", "optimiser", "reference", "media workers", "towers")
        return {name: parts[name] for name in names}

    def generating(self, *, leaves: bool) -> dict[str, float]:
        """Of a GPU that is shared, in the engine's turn. ``leaves``: the rank's weights, gradients
        and optimiser are in host memory meanwhile; its media workers are not."""
        tokens = self.config.rollout.engine.max_num_batched_tokens or BATCHED_TOKENS
        stays = self.learner_stays
        left = stays["media workers"] if leaves else sum(stays.values())
        return {
            "engine's weights": self.weights,
            "keys and values": self.engine_cache,
            "engine's step": self._step_bytes(tokens),
            "learner": left,
            "contexts": 2 * CONTEXT_BYTES,
        }

    def _step_bytes(self, tokens: int) -> float:
        """Of a forward without gradients: one layer at a time, and the logits of its sequences."""
        layer = activation_bytes(self.model, tokens) / self.model.layers
        sequences = self.config.rollout.engine.sequences_on("cuda")
        return layer + 2.0 * sequences * self.model.vocabulary * FLOAT32

    @property
    def training(self) -> dict[str, float]:
        """Of a GPU that is shared, in the learner's turn: the engine sleeps."""
        return self.learner_parts | {"contexts": 2 * CONTEXT_BYTES}

    def leaves(self, gpu: float) -> bool:
        """Whether a colocated learner must leave a GPU of so many bytes while engines work."""
        return sum(self.generating(leaves=False).values()) + SHARED_RESERVE > gpu

    def misfits(self, gpu: float) -> list[str]:
        """Why a colocated run does not fit into a GPU of so many bytes, each with the remedy."""
        found = []
        room = gpu - SHARED_RESERVE
        engine, longest = self.config.rollout.engine, self.rollout_parts["keys and values"]
        what = f"of {_gib(gpu)} with {_gib(SHARED_RESERVE)} left for graphs and gaps"
        generating = self.generating(leaves=True)
        if self.engine_cache < longest:
            found.append(
                f"rollout.engine.kv_cache_memory_bytes {_gib(self.engine_cache)} is below one "
                f"longest sequence, {_gib(longest)} at max_model_len {engine.max_model_len}"
            )
        if sum(generating.values()) > room:
            other = sum(generating.values()) - self.engine_cache
            remedy = (
                f"at most {int(room - other)} bytes of keys and values fit: lower "
                "rollout.engine.kv_cache_memory_bytes"
                if room - other >= longest
                else "the model is too large for this GPU"
            )
            found.append(f"generating takes {_words(generating)} {what}; {remedy}")
        if sum(self.training.values()) > room:
            found.append(
                f"training takes {_words(self.training)} {what}; train an adapter (learner.lora), "
                "offload the optimiser (learner.optimizer.offload_optimizer), lower "
                "learner.micro_batch_tokens, or set learner.gradient_checkpointing"
            )
        return found

    @property
    def learner_host(self) -> dict[str, float]:
        """Of the host of one learner rank, without what rank 0 publishes."""
        config, setting = self.config, self.setting
        optimizer = optimizer_bytes(self.model, setting) * setting.split(1)
        caches = config.data.template.cache_bytes + config.data.media.memory_cache_bytes
        # Of a model that is split a rank keeps its share; others send each tensor on to the GPU.
        loading = float(self.model.vocabulary * self.model.hidden * BFLOAT16)
        if setting.ranks > 1 and (setting.split(3) < 1 or setting.reference):
            loading = max(loading, self.weights / setting.ranks)
        return {
            "process": PROCESS_BYTES,
            "weights while loading": loading,
            "optimiser": optimizer if setting.offload else 0.0,
            "prompts and media": caches,
            "media workers": (setting.workers + setting.decoders) * WORKER_BYTES,
            "away from the GPU": self._away_on_host,
        }

    @property
    def _away_on_host(self) -> float:
        """Colocated, of a rank that leaves its GPU to the engine: its buffers, kept from turn to
        turn. On a machine that nobody names it may."""
        machine = self.config.resources.machine
        stays = machine is not None and not self.leaves(machine.gpu_gib * GIB)
        if stays or not self.config.resources.colocate:
            return 0.0
        return sum(self.learner_stays.values()) - self.learner_stays["media workers"]

    @property
    def version(self) -> float:
        """What rollouts get of a version: the adapter alone, or all weights, as the learner
        publishes it."""
        lora = self.config.learner.lora
        if lora is None or not takes_adapter(self.config, self.folder):
            return self.weights
        return float(self.model.adapter(lora.rank, lora.targets) * BFLOAT16)

    @property
    def published(self) -> float:
        """Of rank 0's host besides: the version that was published last, and the one being
        written."""
        return 2 * self.version

    @property
    def rollout_host(self) -> dict[str, float]:
        """Of the host of one rollout actor."""
        data, engine = self.config.data, self.config.rollout.engine
        machine = self.config.resources.machine
        cores = machine.cpus if machine is not None else 1 << 10
        workers = engine.media_workers_on("cuda", cores=cores) if self.model.encoders else 0
        caches = data.media.memory_cache_bytes + data.template.cache_bytes
        return {
            "process": float(PROCESS_BYTES * engine.tensor_parallel_size),
            "weights asleep": self.weights if self.config.resources.colocate else 0.0,
            "prompts and media": float(engine.prompt_cache_bytes) + caches,
            "media workers": float(workers * WORKER_BYTES),
            "stored embeddings": float(HELD_BYTES * self.config.rollout.stored_embeddings),
        }

    @property
    def host(self) -> float:
        """Of all hosts: the weight store, and an optimiser that is offloaded."""
        offloaded = optimizer_bytes(self.model, self.setting) if self.setting.offload else 0.0
        return self.object_store + offloaded

    @property
    def object_store(self) -> float:
        """Versions of the weights in Ray's object store."""
        return BOARD_VERSIONS * self.version

    @property
    def checkpoint(self) -> float:
        """One checkpoint of the learner: weights, master copies and moments of what trains."""
        trained = self.setting.trained(self.model)
        return optimizer_bytes(self.model, self.setting) + trained * BFLOAT16

    @property
    def without_gpus(self) -> float:
        """All memory of a run on CPUs, in float32: actors, ranks and the weight store."""
        setting = LearnerSetting.of(self.config, self.model, number=FLOAT32)
        weights = self.model.parameters * FLOAT32
        held = learner_parts(self.model, setting)
        rank = sum(held[name] for name in ("weights", "gradients", "optimiser", "reference"))
        actors = self.config.rollout.workers * weights
        return actors + setting.ranks * rank + BOARD_VERSIONS * weights

    def rows(self) -> list[tuple[str, str]]:
        """For the dry run: place, and its parts in words."""
        learner, engine = self.config.learner, self.config.rollout.engine
        store = self.config.learner.embeddings
        what = "embeddings" if self.setting.workers else "pixels" if self.setting.decoders else ""
        disk = f"up to {_gib(store.bytes)} of {what}" if what else "none"
        gpus = [
            (f"learner GPU, each of {learner.ranks}", _words(self.learner_parts)),
            (f"rollout GPU, {engine.tensor_parallel_size} per actor", _words(self.rollout_parts)),
        ]
        if self.config.resources.colocate:
            smaller = sum(self.generating(leaves=False).values()) + SHARED_RESERVE
            gpus = [
                ("shared GPU, generating", _words(self.generating(leaves=False))),
                ("  the same, learner on the host", _words(self.generating(leaves=True))),
                ("  which is done on GPUs below", _gib(smaller)),
                ("shared GPU, training", _words(self.training)),
                ("  left free in both", _gib(SHARED_RESERVE)),
            ]
        return [
            *gpus,
            ("host, each learner rank", _words(self.learner_host)),
            ("host, rank 0 besides", f"{_gib(self.published)}: two versions"),
            ("host, each rollout actor", _words(self.rollout_host)),
            ("host, object store", f"{_gib(self.object_store)}: {BOARD_VERSIONS} versions"),
            ("node's disk", disk),
            ("checkpoint", _gib(self.checkpoint)),
        ]


def _words(parts: Parts) -> str:
    """The sum, and the parts that are not zero, largest first."""
    some = sorted(((size, name) for name, size in parts.items() if size), reverse=True)
    said = ", ".join(f"{name} {size / GIB:.1f}" for size, name in some)
    return f"{_gib(sum(parts.values()))}: {said}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def leaves_device(config: RunConfig) -> bool:
    """Whether a colocated learner moves to host memory while engines work: where its GPU is too
    small for both, and where the model's or the GPU's size is not known."""
    plan, (gpus, _) = MemoryPlan.of(config), local_gpus()
    return plan is None or not gpus or plan.leaves(min(gpu.bytes for gpu in gpus))


def lasting_bytes(model: Architecture, setting: LearnerSetting) -> float:
    """What a rank's GPU holds between two steps."""
    parts = learner_parts(model, setting)
    return sum(parts[name] for name in ("weights", "gradients", "optimiser", "reference"))


def memory_table(ranks: int = 8, tokens: int = 131_072) -> str:
    """The plans as a Markdown table; docs/cluster.md holds a copy that a test keeps equal."""
    head = (
        f"| model | parameters | rollout: weights | rollout: KV of {tokens >> 10}k tokens "
        f"| learner GPU, ZeRO 3 x {ranks} | learner GPU, ZeRO 2 x {ranks} | the same, offloaded "
        f"| LoRA r 32, ZeRO 3 x {ranks} | pack of 16k, checkpointed | host of the offload "
        f"| object store, {BOARD_VERSIONS} versions |"
    )
    rows = [head, "|---|" + "---:|" * 10]
    for item in ARCHITECTURES:
        zero3, zero2 = (LearnerSetting(ranks=ranks, zero_stage=stage) for stage in (3, 2))
        offloaded = LearnerSetting(ranks=ranks, zero_stage=2, offload=True)
        lora = LearnerSetting(ranks=ranks, zero_stage=3, reference=False, adapter_rank=32)
        of_pack = LearnerSetting(pack_tokens=16_384, checkpointing=True)
        pack = learner_parts(item, of_pack)
        sizes = (
            item.parameters * BFLOAT16,
            item.cache_bytes(tokens),
            *(lasting_bytes(item, setting) for setting in (zero3, zero2, offloaded, lora)),
            pack["activations"] + pack["logits"],
            optimizer_bytes(item, offloaded),
            item.parameters * BFLOAT16 * BOARD_VERSIONS,
        )
        cells = " | ".join(f"{size / GIB:.0f} GiB" for size in sizes)
        rows.append(f"| {item.name} | {item.parameters / 1e9:.1f} B | {cells} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(memory_table())
