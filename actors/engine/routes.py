"""The experts of completions, as an engine's workers recorded them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avatar_rl.actors.engine.vllm_plugin.routes import Routes
from avatar_rl.common.errors import ModelError

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.outputs import RequestOutput


class ExpertRoutes:
    """Of an engine that records (``launch.recording_arguments``)."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine

    def of(self, output: RequestOutput, n: int) -> dict[int, Routes]:
        """What the tokens of each of ``n`` completions took, but the last of each, which the
        engine never computes; by index. Raises ModelError where a token's are missing."""
        counts = {
            _name(output.request_id, part.index, n): max(0, len(part.token_ids) - 1)
            for part in output.outputs
        }
        found = self._take(counts)
        short = [name for name, count in counts.items() if count and len(found[name]) < count]
        if short:
            raise ModelError(f"completion {short[0]!r}: vLLM recorded experts of too few tokens")
        names = {part.index: _name(output.request_id, part.index, n) for part in output.outputs}
        return {index: found[name] for index, name in names.items()}

    def forget(self, request_id: str, n: int) -> None:
        """A request that was given up."""
        self._take({_name(request_id, index, n): 0 for index in range(n)})

    def _take(self, counts: dict[str, int]) -> dict[str, Routes]:
        # Each worker has all of them: routers are not split.
        workers: list[dict[str, Routes]]
        workers = self._engine.collective_rpc("take_experts", args=(counts,))
        return workers[0]


def _name(request_id: str, index: int, n: int) -> str:
    """vLLM's name of completion ``index`` of ``n``, without the random end that it adds."""
    return request_id if n == 1 else f"{index}_{request_id}"
