"""A learner rank: joins the group, loads the policy, and trains steps or a cold start.

A step itself is in step.py, the supervised Stage 0 in sft.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.common.errors import ConfigError
from avatar_rl.common.process import (
    HeapTrimmer,
    no_collections,
    sees_gpu,
    set_aside_imports,
)
from avatar_rl.common.turn_lock import TurnLock
from avatar_rl.common.weight_files import fingerprint
from avatar_rl.learner.adapter.base import BaseRecord
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.batch.packing import Size, pack
from avatar_rl.learner.batch.plan import StepSource
from avatar_rl.learner.engine import (
    FrozenEngine,
    TrainEngine,
    deepspeed_config,
    init_distributed,
)
from avatar_rl.learner.media.ahead import AheadEncoder, Lookahead
from avatar_rl.learner.media.opening import MediaSetting, node_share, open_encoder
from avatar_rl.learner.model.load import load_model, recompute_activations
from avatar_rl.learner.model.names import NameMap
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.model.reference import JointReference, ReferencePolicy
from avatar_rl.learner.model.router import Routers
from avatar_rl.learner.model.sequence import SequenceGroup
from avatar_rl.learner.model.sharded_load import NoSharesError, load_in_shares
from avatar_rl.learner.publication import (
    AdapterPublication,
    Publication,
    open_road,
    published_adapter,
)
from avatar_rl.learner.sft import ColdStart, SftReport
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state import StateReplicator
from avatar_rl.learner.step import StepReport, StepTrainer
from avatar_rl.learner.turn import ParkedState, RankTurn
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from avatar_rl.learner.config import OptimizerConfig

#: A rank waits this long for another one; generation between steps may take minutes.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class Progress(TypedDict):
    """How far a rank has come, and where it runs."""

    moves: int  # stays as it is while the rank hangs
    host: str
    pid: int


class SetupReport(TypedDict):
    """What a rank that is ready has loaded."""

    rank: int
    dtype: str
    parameters: int
    warnings: list[str]  # what is probably wrong with the model's prompts
    lora: str  # what of the model its adapter trains; empty without one
    why_pixels: str  # why media do not go through the embedding store; empty where they do


class ProbeCompletion(TypedDict):
    """A completion of the engine that the learner shall score."""

    prompt_id: str
    token_ids: NDArray[np.int32]
    temperature: float


class ProbeScores(TypedDict):
    """The learner's view of a probe completion."""

    prompt_token_ids: NDArray[np.int64]
    placeholders: dict[str, list[int]]  # shapes of the media tensors, by name
    logprobs: NDArray[np.float32]


class LearnerRank:
    """Plain class behind ``avatar_rl.learner.actor``. Methods without "rank 0" in their text run on
    every rank."""

    engine: TrainEngine  # this and what follows are there after ``setup``
    device: torch.device
    replicator: StateReplicator
    names: NameMap
    routers: Routers
    publication: Publication
    heap: HeapTrimmer
    lookahead: Lookahead  # only with the embedding store

    def __init__(
        self,
        spec: LearnerSpec,
        rank: int,
        ranks: int,
        weight_store: ActorHandle,
        state_replica: ActorHandle | None = None,
    ) -> None:
        self.spec, self.rank, self.ranks = spec, rank, ranks
        self.state_replica = state_replica
        self.prompts = PromptIndex.read(spec.datasets, spec.data)
        self.encoder: PromptEncoder | AheadEncoder = PromptEncoder(
            spec.model, MediaLoader(spec.media, base=Path(".")), spec.template
        )
        self.outbox = Outbox(weight_store)
        lock = spec.turn_lock
        self.turn = RankTurn(
            TurnLock(lock, f"learner-{rank}", rank=rank) if lock is not None else None
        )
        self.cold_start: ColdStart | None = None
        self.trainer: StepTrainer | None = None  # of a rank that is no cold start

    def progress(self) -> Progress:
        """How far it has come; answered while a step is trained."""
        moves = self.trainer.moves if self.trainer is not None else 0
        return {"moves": moves, "host": socket.gethostname(), "pid": os.getpid()}

    def meeting_point(self) -> tuple[str, int]:
        """Rank 0: address and port where the group meets."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    @no_collections()
    def setup(self, address: str, port: int) -> SetupReport:
        """Join the group and load the policy."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(self.ranks),
            LOCAL_SIZE="1",
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
        spec, on_gpu = self.spec, sees_gpu()
        self.turn.begin()
        init_distributed(on_gpu=on_gpu, timeout=COLLECTIVE_TIMEOUT)
        if not on_gpu:
            _, on_this_node = node_share(self.rank, self.ranks)
            torch.set_num_threads(spec.learner.threads_of(on_this_node))
        set_aside_imports()
        optimizer = self._optimizer
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        dtype = (
            optimizer.dtype if optimizer.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
        )
        policy, adapter = self._load_policy(dtype)
        self.engine = TrainEngine(
            policy, optimizer, world_size=self.ranks, dtype=dtype, adapter=adapter
        )
        why_pixels = self._take_embeddings(policy, dtype)
        base = BaseRecord.of(spec.model, spec.lora)
        self.replicator = StateReplicator(
            self.engine, self.rank, self.state_replica, max_bytes=spec.replica_bytes, base=base
        )
        self.publication = self._publication(base, dtype)
        if spec.sft is not None:
            prompts = list(self.prompts)
            self.cold_start = ColdStart(
                self.engine, self.encoder, prompts, spec.sft, rank=self.rank
            )
        else:
            self.trainer = self.make_trainer(dtype)
        if spec.turn_lock is not None and spec.leaves_device:
            self.turn.parked = ParkedState(self._on_device, self.engine.device)
        self.heap = HeapTrimmer(active=not on_gpu)
        # Under ZeRO 3 a parameter itself holds nothing between two forwards.
        parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in policy.parameters())
        return {
            "rank": self.rank,
            "dtype": dtype,
            "parameters": parameters,
            "warnings": self.encoder.warnings,
            "why_pixels": why_pixels,
            "lora": adapter.summary() if adapter is not None else "",
        }

    def _on_device(self) -> list[object]:
        """What of this rank lies on its device between two steps."""
        found = [self.engine.policy, self.engine.optimizer, self.engine.engine.optimizer]
        if self.trainer is not None and self.trainer.reference is not None:
            found.append(getattr(self.trainer.reference, "policy", None))
        if isinstance(self.encoder, AheadEncoder):
            found += self.encoder.modules
        return found

    def _publication(self, base: BaseRecord, dtype: str) -> Publication:
        """The way out of the policy, or of its adapter."""
        layout, only = self.names.layout, self.spec.publishes_adapter
        if self.engine.adapter is not None and only:
            [own] = self.engine.adapter_weights()
            layout = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                for name, tensor in published_adapter(own, self.names).items()
            }
        sender = WeightSender(layout, self.outbox, dtype=dtype) if self.rank == 0 else None
        road = None
        if self.spec.transport != "board" and self.spec.sft is None and not only:
            road = open_road(self.spec, self.engine.policy, self.names, sender, dtype)
        if self.engine.adapter is None:
            return Publication(self.engine, self.names, sender, road)
        return AdapterPublication(
            self.engine, self.names, sender, base=base, adapter_only=only, road=road
        )

    def _take_embeddings(self, policy: Policy, dtype: str) -> str:
        """Media through the embedding store from now on; why not where they cannot."""
        spec, encoder = self.spec, cast("PromptEncoder", self.encoder)
        has_reference = spec.sft is None and spec.learner.objective.beta > 0
        setting = MediaSetting(
            model=spec.model,
            reference=spec.reference if has_reference else None,
            trained=[name for name, p in policy.named_parameters() if p.requires_grad],
            dtype=dtype,
            device=self.engine.device,
            media=spec.media,
            template=spec.template,
            threads=spec.learner.threads or 1,
        )
        self.encoder, why = open_encoder(encoder, spec.learner.embeddings, setting)
        share = node_share(self.rank, self.ranks)
        # Workers with towers would encode on the device in the engine's turn.
        ahead = spec.sft is None and (spec.turn_lock is None or bool(why))
        if isinstance(self.encoder, AheadEncoder) and ahead:
            buffer = ReplayBuffer.connect(
                spec.buffer, spec.run_id, url=spec.redis_url, create=False
            )
            outstanding = buffer.requests.outstanding
            self.lookahead = Lookahead(outstanding, self.prompts, self.encoder, share)
        return why

    def _load_policy(self, dtype: str) -> tuple[Policy, Adapter | None]:
        spec = self.spec
        model = self._load(spec.model, dtype, self._optimizer)
        self.names = NameMap.of(model, spec.model)
        self.routers = Routers(model, spec.learner.router, spec.learner.router_balance)
        adapter = None
        if spec.lora is not None:
            key = "learner.lora" if spec.sft is None else "cold_start.lora"
            adapter = Adapter.attach(model, spec.lora, seed=spec.seed, key=key)
        if spec.learner.gradient_checkpointing:
            if spec.lora is not None and spec.lora.dropout:
                raise ConfigError(
                    "lora.dropout above 0 and learner.gradient_checkpointing exclude each other: "
                    "what is computed again would drop other numbers; set dropout to 0"
                )
            recompute_activations(model)
        if adapter is not None:
            adapter.drop(active=False)
        return Policy(model, self._sequence(), self.routers.replay), adapter

    @property
    def _optimizer(self) -> OptimizerConfig:
        spec = self.spec
        return spec.sft.optimizer if spec.sft is not None else spec.learner.optimizer

    def _load(self, folder: Path, dtype: str, config: OptimizerConfig) -> nn.Module:
        """A model, or under ZeRO 3 this rank's share of it, without holding more of it on the
        host."""
        if config.zero_stage == 3 and self.ranks > 1:
            shares = deepspeed_config(config, self.ranks, dtype)
            return load_in_shares(folder, dtype=dtype, deepspeed_config=shares)
        return load_model(folder, dtype=dtype, device=self.device)

    def _sequence(self) -> SequenceGroup | None:
        """The ranks that share packs with this one. Collective."""
        size = self.spec.learner.sequence_parallel
        if size == 1 or self.spec.sft is not None:
            return None
        return SequenceGroup(size, rank=self.rank, ranks=self.ranks, timeout=COLLECTIVE_TIMEOUT)

    def make_trainer(self, dtype: str) -> StepTrainer:
        """What trains the steps: with the reference policy where the loss has a KL term, and on
        rank 0 with the buffer."""
        spec = self.spec
        source = None
        reference = self._reference(dtype) if spec.learner.objective.beta > 0 else None
        self.replicator.reference = reference.cache if reference is not None else None
        if self.rank == 0:
            buffer = ReplayBuffer.connect(
                spec.buffer, spec.run_id, url=spec.redis_url, create=False
            )
            source = StepSource(buffer, spec)
        return StepTrainer(
            spec,
            self.rank,
            self.ranks,
            self.engine,
            self.prompts,
            self.encoder,
            self.replicator,
            reference=reference,
            source=source,
            publication=self.publication,
            routers=self.routers,
        )

    def _reference(self, dtype: str) -> ReferencePolicy:
        """The policy with its adapter off where that is the reference; else a second model, of
        which several ranks have a share each."""
        spec, device = self.spec, self.engine.device
        cached, name = spec.learner.reference_cache, f"{fingerprint(spec.reference)} {dtype}"
        if spec.lora and spec.reference == spec.model:
            score = self.engine.score_base
            return JointReference(score, device=device, cached=cached, source=name)
        sequence = self.engine.policy.sequence
        config = self._optimizer.model_copy(update={"zero_stage": 3})
        try:
            shared = self._load(spec.reference, dtype, config) if self.ranks > 1 else None
        except NoSharesError:
            if self._optimizer.zero_stage == 3:
                raise
            shared = None
        if shared is not None:
            frozen = Policy(shared, sequence)
            split = FrozenEngine(frozen, config, world_size=self.ranks, dtype=dtype)
            return JointReference(
                split.score, device=device, cached=cached, policy=frozen, source=name
            )
        return ReferencePolicy(
            spec.reference,
            dtype=dtype,
            device=device,
            cached=cached,
            sequence=sequence,
            source=name,
        )

    def sft(self, first: int, count: int) -> SftReport:
        """``count`` cold-start updates from ``first``: mean loss per token and tokens seen."""
        assert self.cold_start is not None
        self.heap.trim()
        return self.cold_start.run(first, count)

    def probe(self, completions: Sequence[ProbeCompletion]) -> list[ProbeScores]:
        """The learner's view of the engine's probe completions, for the parity probe.

        They share micro-batches as in training: the engine scored each alone."""
        rows = []
        for item in completions:
            prompt = self.encoder.encode(self.prompts[item["prompt_id"]], hinted=False)
            key = (item["prompt_id"], False)
            rows.append(Row(key, prompt, item["token_ids"], item["temperature"], prompt.media))
        sizes = [Size(row.key, len(row.prompt.input_ids), len(row.token_ids)) for row in rows]
        answers: dict[int, ProbeScores] = {}
        for indices in pack(sizes, self.spec.learner.pack_tokens()):
            output = self.engine.score(collate([rows[i] for i in indices]))
            for i, logprobs in zip(indices, output.logprobs, strict=True):
                prompt = rows[i].prompt
                answers[i] = {
                    "prompt_token_ids": prompt.input_ids.numpy(),
                    "placeholders": _media_shapes(prompt),
                    "logprobs": logprobs[: sizes[i].tokens].cpu().numpy(),
                }
        return [answers[i] for i in range(len(rows))]

    def train_step(self, step: int, *, samples: int = 0) -> StepReport | None:
        """Train ``step``, publish the next version and commit; see ``StepTrainer.train_step``."""
        assert self.trainer is not None
        report = self.trainer.train_step(step, samples=samples)
        self.heap.trim()
        return report

    def export(self, path: Path) -> str:
        """Write the policy as a Hugging Face checkpoint, an adapter below it (rank 0 writes, all
        ranks gather)."""
        self.publication.export(self.spec.model, path)
        return str(path)

    def publish_again(self, version: int | None = None) -> int:
        """Rank 0 offers the newest version to a weight store that lost it.

        After a restore all ranks are asked, with ``version``: then the weights are published under
        this number. Returns the version.
        """
        if version is None:
            return self.publication.put_again()
        self.publication.publish(version)
        return version


def _media_shapes(prompt: EncodedPrompt) -> dict[str, list[int]]:
    shapes = {name: list(value.shape) for name, value in prompt.features.items()}
    return shapes | ({"embeddings": list(prompt.media.values.shape)} if prompt.media else {})
