"""vLLM's renderer, which expands placeholders and preprocesses media: in the engine's process, or
in another without an engine."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, cast

from avatar_rl.actors.engine.prompt_cache import EngineInput, RenderedPrompt
from avatar_rl.common.errors import DataError

if TYPE_CHECKING:
    from vllm.inputs import TokensPrompt
    from vllm.renderers import BaseRenderer


def rendered_by(renderer: BaseRenderer, engine_input: EngineInput, name: str) -> RenderedPrompt:
    """The prompt as the engine takes it. Raises DataError that says ``name``."""
    try:
        prompt = cast("TokensPrompt", engine_input)
        return cast("RenderedPrompt", renderer.render_cmpl([prompt])[0])
    except MemoryError:
        raise
    except Exception as error:  # processors raise anything on odd media
        raise DataError(
            f"request {name!r}: vLLM cannot process the prompt or its media "
            f"({type(error).__name__}: {error}); correct or leave out this prompt"
        ) from error


def renderer_of(config: bytes) -> BaseRenderer:
    """A renderer like the engine's, of ``RolloutEngine.settings``; imports vLLM, which takes
    seconds. The environment must be the engine's."""
    settings = pickle.loads(config)  # of the parent process
    from vllm.renderers import renderer_from_config

    from avatar_rl.actors.engine.vllm_plugin import register

    register()  # it corrects processors, too
    return renderer_from_config(settings)
