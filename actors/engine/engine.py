"""One rollout engine: vLLM in this process, n completions per prompt, weights adopted in place.

engine = RolloutEngine(model_path, EngineConfig(), version=0)
engine.submit("g7", encoder.engine_input(prompt, hinted=False), RequestSampling(n=4), seed=11)
while engine.in_flight:
    for finished in engine.step():
        ...  # finished.completions[i].logprobs: the behaviour policy
engine.adopt(1, weights.items())                     # between steps
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Hashable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from avatar_rl.actors.config import EngineConfig, RequestSampling
from avatar_rl.actors.engine.adapters import Adapters, adapter_arguments
from avatar_rl.actors.engine.launch import (
    check_heads,
    engine_arguments,
    forbidden_token_ids,
    model_kind,
    pick_device,
    prepare_environment,
    quieten,
    recording_arguments,
    sleep_arguments,
    stop_token_ids,
)
from avatar_rl.actors.engine.prompt_cache import EngineInput, PromptCache, RenderedPrompt
from avatar_rl.actors.engine.rendering import rendered_by
from avatar_rl.actors.engine.routes import ExpertRoutes
from avatar_rl.actors.engine.stored_media import StoredMedia
from avatar_rl.buffer_service.weights.adapter_contract import AdapterContract
from avatar_rl.buffer_service.weights.member import MemberSettings
from avatar_rl.buffer_service.weights.receiver import ProvenWeights, WeightContract
from avatar_rl.buffer_service.weights.road_receiver import HeldWeights
from avatar_rl.common.adapter import AdapterShape
from avatar_rl.common.errors import DataError, ModelError, ResourceError
from avatar_rl.common.process import set_aside_imports

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.core_client import InprocClient

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedCompletion:
    """One sampled completion of T tokens, end-of-turn token included when the model wrote one."""

    token_ids: NDArray[np.int32]  # (T,)
    # (T,) log softmax(logits / temperature) over the whole vocabulary; greedy: at temperature 1
    logprobs: NDArray[np.float32]
    finish_reason: str  # "stop" | "length"
    versions: tuple[tuple[int, int], ...]  # ((policy version, tokens generated with it), ...)
    text: str  # without the end-of-turn token, special tokens spelt out
    #: (T - 1, decoder layers, k), the experts of each token but the last, which the engine never
    #: computes; None of an engine that does not record them.
    experts: NDArray[np.uint8] | NDArray[np.uint16] | None = None


@dataclass(frozen=True)
class FinishedRequest:
    """A prompt whose completions have all ended, in the order of their index."""

    request_id: str
    prompt_token_ids: NDArray[np.int32]  # (L,) placeholders expanded
    completions: tuple[GeneratedCompletion, ...]


class RolloutEngine:
    """vLLM behind five methods: ``submit``, ``prepare``, ``step``, ``adopt`` and ``abort``.

    One at a time per process, used by one thread; ``prepare``, ``prepared`` and ``prove`` may be
    called by another meanwhile. Raises ModelError when the folder cannot be served. Raises
    ResourceError when the device is missing or the process has an open engine: vLLM's process
    groups are global, and closing one engine would break the other.
    """

    _occupied: ClassVar[bool] = False

    def __init__(
        self,
        model_path: Path,
        config: EngineConfig,
        *,
        version: int = 0,
        adapter: AdapterShape | None = None,
        sleeps: bool = False,
        records_experts: bool = False,
        stored: StoredMedia | None = None,
    ) -> None:
        self.config = config
        self.version = version
        self.stored = stored  # embeddings of media, taken in the place of a tower's run
        path = Path(model_path)
        kind = model_kind(path)
        self.device = pick_device(config)
        check_heads(path, config.tensor_parallel_size)
        # With an adapter, versions are adapters on the weights it was started from.
        self._contract: WeightContract | AdapterContract
        self._contract = WeightContract(path) if adapter is None else AdapterContract(path, adapter)
        if RolloutEngine._occupied:
            raise ResourceError(
                "this process already runs a rollout engine: close it first, or start another "
                "process"
            )
        prepare_environment(config, self.device)
        from vllm import EngineArgs, LLMEngine

        from avatar_rl.actors.engine.vllm_plugin import embeddings, register

        register()
        quieten()
        set_aside_imports()
        try:
            arguments = engine_arguments(path, kind, config, self.device)
            arguments |= adapter_arguments(adapter) if adapter is not None else {}
            arguments |= sleep_arguments(self.device) if sleeps else {}
            arguments |= recording_arguments(arguments) if records_experts else {}
            arguments |= embeddings.connector_arguments(stored)
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise ModelError(f"vLLM cannot serve {path} (model_type {kind!r}): {error}") from error
        RolloutEngine._occupied = True
        quieten()
        # A copy of its own: preparing a prompt in another thread borrows vLLM's, and decoding would
        # fail meanwhile.
        self._tokenizer = cast("PreTrainedTokenizerBase", deepcopy(self._engine.get_tokenizer()))
        self._stop_ids = stop_token_ids(path, self._tokenizer)
        vocabulary = self._engine.model_config.get_vocab_size()
        forbidden = forbidden_token_ids(self._tokenizer, self._stop_ids, vocabulary)
        self._engine.collective_rpc("install_rollout_sampler", args=(forbidden,))
        self._engine.set_weight_version(str(version))
        self._prompts = PromptCache(config.prompt_cache_bytes)
        self._adapters = Adapters(self._engine, adapter) if adapter is not None else None
        self._pending: dict[str, RequestSampling] = {}
        self._routes = ExpertRoutes(self._engine) if records_experts else None
        self._broken: str | None = None
        self.asleep = False
        self._warned = False
        self._path, self._member = path, False

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet returned by ``step``."""
        return len(self._pending)

    def submit(
        self,
        request_id: str,
        engine_input: EngineInput | RenderedPrompt,
        sampling: RequestSampling,
        seed: int | None = None,
    ) -> None:
        """Queue a prompt for ``sampling.n`` completions.

        Equal seeds give equal completions on equal weights and device, whatever else is in flight,
        up to the rounding of batched arithmetic.

        Args:
            request_id: Names the request in ``step``, ``abort`` and errors.
            engine_input: ``PromptEncoder.engine_input``, or what ``prepare`` made of it.
            sampling: How the completions are drawn, and how many.
            seed: Of the completions' noise; without one they differ from call to call.

        Raises:
            DataError: The model cannot take the prompt, it leaves no room for max_tokens, or the
                request id is in flight.
        """
        from vllm.exceptions import VLLMClientError

        self._check_alive()
        if request_id in self._pending:
            raise DataError(f"request id {request_id!r} is already in flight: use one id per group")
        rendered = (
            cast("RenderedPrompt", engine_input)
            if "type" in engine_input
            else self.prepare(engine_input, request_id)
        )
        length = len(rendered["prompt_token_ids"])
        if length + sampling.max_tokens > self.config.max_model_len:
            raise DataError(
                f"request {request_id!r}: {length} prompt tokens + max_tokens "
                f"{sampling.max_tokens} exceed max_model_len {self.config.max_model_len}: "
                "shorten the prompt (fewer frames, or data.reader.max_pixels), or raise "
                "rollout.engine.max_model_len; `avatar data validate DATA --recipe RECIPE` "
                "measures them all"
            )
        self._warn_truncation(sampling)
        lora = self._adapters.begin(request_id, self.version) if self._adapters else None
        try:
            parameters = self._parameters(sampling, seed)
            self._engine.add_request(request_id, rendered, parameters, lora_request=lora)
        except (ValueError, VLLMClientError) as error:
            self._forget(request_id)
            raise DataError(f"request {request_id!r}: vLLM refuses the prompt: {error}") from error
        self._pending[request_id] = sampling

    def prepared(self, key: Hashable) -> RenderedPrompt | None:
        """What ``prepare`` made under ``key``, while the cache still has it.

        It spares the template, the tokens and the media.
        """
        rendered = self._prompts.get(key)
        return None if rendered is None else rendered.copy()

    def prepare(
        self, engine_input: EngineInput, request_id: str = "", key: Hashable | None = None
    ) -> RenderedPrompt:
        """The prompt with its media preprocessed, from the cache where the same prompt was here
        before.

        ``key`` names the prompt for ``prepared``; without one its content does. ``submit`` does
        this itself; one other thread may do it ahead while this one steps. Raises DataError.
        """
        if key is None:
            key = self._prompts.key(engine_input)
        rendered = self._prompts.get(key)
        if rendered is None:
            rendered = rendered_by(self._engine.renderer, engine_input, request_id)
            self._prompts.put(key, rendered)
        return rendered.copy()

    def keep(self, key: Hashable, rendered: RenderedPrompt) -> RenderedPrompt:
        """What another process made of a prompt; ``prepared`` finds it under ``key``."""
        self._prompts.put(key, rendered)
        return rendered.copy()

    @property
    def settings(self) -> bytes:
        """For ``renderer_of``: to prepare prompts in a process without an engine."""
        return pickle.dumps(self._engine.vllm_config)

    def step(self) -> list[FinishedRequest]:
        """One decoding step of everything in flight; returns the requests whose last completion
        ended in it."""
        from vllm import RequestOutput

        self._check_alive()
        finished = []
        for output in self._engine.step():
            assert isinstance(output, RequestOutput)
            if output.finished and (sampling := self._pending.pop(output.request_id, None)):
                version = self._forget(output.request_id)
                experts = self._routes.of(output, sampling.n) if self._routes else {}
                completions = tuple(
                    replace(self._completion(part, version), experts=experts.get(part.index))
                    for part in sorted(output.outputs, key=lambda o: o.index)
                )
                prompt = np.asarray(output.prompt_token_ids, dtype=np.int32)
                finished.append(FinishedRequest(output.request_id, prompt, completions))
        return finished

    @property
    def adopts_in_flight(self) -> bool:
        """Requests in flight continue when weights change (EngineConfig.weight_update)."""
        return self.config.weight_update == "keep" or self.adopts_free

    @property
    def adopts_free(self) -> bool:
        """New versions cost nothing that is in flight: they are adapters."""
        return self._adapters is not None

    @property
    def can_adopt(self) -> bool:
        """``adopt`` would be accepted now."""
        return self.adopts_in_flight or not self._pending

    def join_transfers(self, transport: str, settings: MemberSettings) -> set[str]:
        """From now on the workers take versions by ``transport`` into their own memory, beside
        their work; ``adopt`` loads one. Returns their names as members."""
        arguments = (transport, settings, self._path)
        names = self._engine.collective_rpc("join_transfers", args=arguments)
        self._member = True
        return set(names)

    def prove(self, weights: Iterable[tuple[str, Tensor]]) -> ProvenWeights:
        """``weights`` checked for ``adopt``, which otherwise does so itself.

        Another thread may call it while this one steps. Raises ModelError.
        """
        return self._contract.check(weights)

    def adopt(self, version: int, weights: Iterable[tuple[str, Tensor]] | HeldWeights) -> bool:
        """Load ``version`` in place; ``weights`` are (published name, tensor) pairs, all of them,
        or what the workers hold already. False where they do not hold it any more, since newer
        ones came; then nothing has changed.

        Everything computed with the old weights is dropped: keys and values, encoder outputs.
        Preprocessed media do not depend on weights and stay.

        Under ``keep`` requests in flight continue. Their prompt and tokens so far are prefilled
        again. So every later token, and its log-probability, is exactly the new policy's;
        ``GeneratedCompletion.versions`` tells the parts. To continue with the old keys and values
        would sample from a policy that never existed, and is not offered.

        With an adapter ``weights`` are an adapter's. Nothing is dropped or prefilled then: requests
        in flight end with the version they began with.

        Raises:
            ModelError: The version is not newer, the update is incomplete or corrupt, or requests
                are in flight under ``drain``; the engine is untouched. Or vLLM failed while
                loading: then the engine is out of use.
        """
        self._check_alive()
        if version <= self.version:
            raise ModelError(
                f"policy version {version} refused: the engine is at {self.version}, versions "
                "only grow"
            )
        if not self.can_adopt:
            raise ModelError(
                f"policy version {version} refused: {len(self._pending)} requests in flight; step "
                "until idle, or set weight_update to keep"
            )
        if isinstance(weights, HeldWeights):
            reserved = self._engine.collective_rpc("reserve_held", args=(version, weights.token))
            if not all(reserved):
                return False
            load = partial(self._engine.collective_rpc, "adopt_held")
        else:
            checked = self._contract.check(weights)
            if self._adapters is not None:
                self._adapters.take(version, checked)
                self.version = version
                return True
            load = partial(self._engine.collective_rpc, "adopt_weights", args=(checked,))
        self._settle()
        # Preempt before the caches are emptied: a running request would otherwise look for encoder
        # outputs that are gone. With async scheduling a step is under way, computed with the old
        # weights: vLLM drops its tokens, and they are sampled again from the new ones.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.reset_encoder_cache()
        try:
            load()
        except Exception as error:
            self._broken = f"loading policy version {version} failed half-way: {error}"
            raise ModelError(f"{self._broken}; close this engine and start a new one") from error
        self.version = version
        self._engine.set_weight_version(str(version))
        return True

    def sleep(self) -> None:
        """Leave the device to another process: keys and values go, weights move to host memory
        (vLLM's sleep level 1, for an engine made with ``sleeps``). On a CPU the memory of keys and
        values is given back and weights stay.

        Until ``wake`` nothing is submitted, stepped or adopted. Raises ModelError while requests
        are in flight.
        """
        if self.asleep:
            return
        self._check_alive()
        if self._pending:
            raise ModelError(
                f"the engine cannot sleep with {len(self._pending)} requests in flight: step until "
                "idle"
            )
        self._settle()
        self._engine.sleep(level=1)
        if self.device == "cpu":
            self._engine.collective_rpc("free_caches")
        self.asleep = True

    def wake(self) -> None:
        """The device is this engine's again: its weights are those of before, its caches empty."""
        if not self.asleep:
            return
        if self.device == "cpu":
            self._engine.collective_rpc("restore_caches")
        self._engine.wake_up()
        self.asleep = False

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        """Give up requests (all by default); returns those that were in flight.

        ``step`` never returns them.
        """
        named = list(self._pending) if request_ids is None else request_ids
        chosen = [request_id for request_id in named if request_id in self._pending]
        self._engine.abort_request(chosen)
        for request_id in chosen:
            n = self._pending.pop(request_id).n
            if self._routes is not None:
                self._routes.forget(request_id, n)
            self._forget(request_id)
        return chosen

    def close(self) -> None:
        """Stop the engine and free its memory; further calls raise ModelError."""
        if self._broken == "closed":
            return
        self._broken = "closed"
        self._pending.clear()
        if self._member:
            self._engine.collective_rpc("leave_transfers")
        self._engine.engine_core.shutdown()
        self._engine.renderer.shutdown()
        if self.stored is not None:
            self.stored.withdraw()
        RolloutEngine._occupied = False

    def _parameters(self, sampling: RequestSampling, seed: int | None) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=[] if sampling.ignore_eos else sorted(self._stop_ids),
            seed=None if sampling.greedy or seed is None else _spread(seed),
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            stop=list(sampling.stop) or None,
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _settle(self) -> None:
        """Without a request in flight: no step is under way either, of one that ended meanwhile.
        Async scheduling begins a step before it knows who ended in the one before."""
        while not self._pending and self.steps_under_way:
            self._engine.step()

    @property
    def steps_under_way(self) -> int:
        """Steps that vLLM has begun and not told of; without async scheduling always 0."""
        client = cast("InprocClient", self._engine.engine_core)
        core = getattr(client, "engine_core", None)  # where the environment puts it in this process
        return len(core.batch_queue or ()) if core is not None else 0

    def _forget(self, request_id: str) -> int | None:
        """The adapter's version of a request that is over; None without adapters."""
        return self._adapters.end(request_id) if self._adapters is not None else None

    def _completion(self, output: CompletionOutput, version: int | None) -> GeneratedCompletion:
        reason, spans = output.finish_reason, output.weight_versions
        if reason not in ("stop", "length"):
            raise ModelError(f"vLLM ended a completion with {reason!r}; see its log for the cause")
        assert spans is not None  # vLLM tells them of every completion that has ended
        sampled = cast("FlatLogprobs", output.logprobs)  # as ``_parameters`` asks
        token_ids = np.asarray(output.token_ids, dtype=np.int32)
        body = (
            token_ids[:-1] if len(token_ids) and int(token_ids[-1]) in self._stop_ids else token_ids
        )
        return GeneratedCompletion(
            token_ids=token_ids,
            logprobs=np.asarray(sampled.logprobs, dtype=np.float32),
            finish_reason=reason,
            versions=tuple((int(span.version), span.end - span.start) for span in spans)
            if version is None
            else ((version, len(token_ids)),),
            text=cast("str", self._tokenizer.decode(body.tolist(), skip_special_tokens=False)),
        )

    def _warn_truncation(self, sampling: RequestSampling) -> None:
        if (sampling.top_p < 1 or sampling.top_k > 0) and not sampling.greedy and not self._warned:
            self._warned = True
            log.warning(
                "top_p %s, top_k %s: completions come from a truncated distribution; their "
                "log-probabilities are those of the whole one, as the learner computes them",
                sampling.top_p,
                sampling.top_k,
            )

    def _check_alive(self) -> None:
        if self._broken is not None:
            raise ModelError(f"this rollout engine is out of use ({self._broken}): start a new one")
        if self.asleep:
            raise ModelError("this rollout engine is asleep, and its device is another's: wake it")


def _spread(seed: int) -> int:
    """A seed of 62 bits. vLLM seeds completion i with seed + i, and the completions of neighbouring
    seeds must not share their noise."""
    return int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest()) >> 2
