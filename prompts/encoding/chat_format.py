"""A model's chat template: tried once when the model's folder is read, and blamed by name later.

What a template or a processor raises says nothing of the prompt at fault. Here it becomes a
DataError that does, or a ModelError where no prompt could work."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from avatar_rl.common.errors import AvatarError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

T = TypeVar("T")
#: One turn of a chat: its role, and its text or its parts.
Turn = dict[str, "str | list[dict[str, str]]"]
#: The day of every prompt whose template asks for one, whenever it is rendered.
_DAY = date(2024, 7, 26)
_THINK_END = re.compile(r"(<(?:think|thinking)>)[^<>]*\Z")  # words may follow: "<think>\nOkay, "
_THINK_SKIPPED = re.compile(r"<(think|thinking)>\s*</\1>\s*\Z")


class ChatFormat:
    """Renders chats with the template of ``processor`` (a text model's tokenizer).

    ``plain``: the template takes a turn's text as a string, as those of text models do. Raises
    ModelError where the template cannot format a question, or the system turn of the recipe.
    """

    def __init__(
        self,
        processor: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        plain: bool,
        system: str | None,
    ) -> None:
        self._processor, self._tokenizer, self._plain = processor, tokenizer, plain
        written = getattr(processor, "chat_template", None)
        #: Given to the template in the place of a clock.
        self._clock: dict[str, Callable[[str], str]] = (
            {"strftime_now": _DAY.strftime} if "strftime_now" in str(written) else {}
        )
        try:
            shown = self._render([self._turn("user", "Question")])
            again = self._render([self._turn("user", "Question")])
        except Exception as error:
            raise ModelError(
                f"the chat template of {folder} cannot format a question ({describe(error)}): take "
                "the template of the model's source, or correct it"
            ) from error
        if shown != again:
            raise ModelError(
                f"the chat template of {folder} renders one chat in two ways: take chance and "
                "clock out of it"
            )
        if "Question" not in shown:
            raise ModelError(
                f"the chat template of {folder} leaves the question out: take the template of the "
                "model's source, or correct it"
            )
        if "'type': 'text'" in shown:
            raise ModelError(
                f"the chat template of {folder} prints the parts of a turn as a list: take the "
                "template of the model's source, which joins their texts"
            )
        #: The opening think tag that the prompt ends with, so that completions begin inside it.
        self.opened_tag = match[1] if (match := _THINK_END.search(shown)) else ""
        self.no_system = self._system_fault(system or "Be brief.")
        if system is not None and self.no_system:
            raise ModelError(
                f"the chat template of {folder} {self.no_system}: set data.template.system to null "
                "and put its words into data.template.instruction"
            )
        self._shown = shown

    def render(self, prompt_id: str, system: str | None, user: str | list[dict[str, str]]) -> str:
        """The chat as text, generation marker included. Raises DataError naming the prompt."""
        if system is not None and self.no_system:
            raise DataError(
                f"prompt {prompt_id!r} brings a system turn, but the model's chat template "
                f"{self.no_system}: move its words from `system` into the question"
            )
        turns: list[Turn] = [] if system is None else [self._turn("system", system)]
        turns.append({"role": "user", "content": user})
        return blame(
            prompt_id,
            "the model's chat template",
            "correct its text, or use another model",
            lambda: self._render(turns),
        )

    def warnings(self, config: PretrainedConfig) -> list[str]:
        """What is probably wrong with the model's prompts though they can be formatted."""
        found = []
        if self._clock:
            found.append(
                f"the chat template writes today's date: every prompt has {_DAY:%d %B %Y} in its "
                "place, so that a run that is resumed sees the same tokens"
            )
        if _THINK_SKIPPED.search(self._shown):
            found.append(
                "the chat template ends the prompt with an empty think block, as if the model had "
                "thought already: completions that do not open another earn no format reward. Take "
                "the template that lets it think, or leave the block out"
            )
        tokenizer = self._tokenizer
        start = tokenizer.bos_token_id
        known = {getattr(one, "bos_token_id", None) for one in (config, config.get_text_config())}
        adds = tokenizer("Question")["input_ids"][:1] == [start]
        ids = tokenizer(self._shown, add_special_tokens=False)["input_ids"]
        if (
            start is None
            or start == tokenizer.eos_token_id
            or start in ids
            or not (adds or start in known)
        ):
            return found
        return [
            *found,
            f"the chat template writes no {tokenizer.bos_token}, with which model type "
            f"{config.model_type!r} was probably trained: if its source says so, put "
            "{{ bos_token }} at the start of the template",
        ]

    def _system_fault(self, system: str) -> str:
        """Why there can be no system turn; empty where there can."""
        turns = [self._turn("system", system), self._turn("user", "Question")]
        try:
            shown = self._render(turns)
        except Exception as error:
            return f"takes no system turn ({describe(error)})"
        return "" if system.strip() in shown else "leaves the system turn out"

    def _turn(self, role: str, text: str) -> Turn:
        return {"role": role, "content": text if self._plain else [{"type": "text", "text": text}]}

    def _render(self, turns: Sequence[Turn]) -> str:
        shown = self._processor.apply_chat_template(
            list(turns),  # type: ignore[arg-type]  # their hints know no parts
            tokenize=False,
            add_generation_prompt=True,
            **self._clock,  # type: ignore[arg-type]  # a variable of the template
        )
        return str(shown)


def blame(prompt_id: str, what: str, remedy: str, act: Callable[[], T]) -> T:
    """The result of ``act``. What it raises becomes a DataError that names the prompt."""
    try:
        return act()
    except (AvatarError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"prompt {prompt_id!r}: {what} refuses it ({describe(error)}); {remedy}"
        ) from error


def describe(error: BaseException) -> str:
    """An error of foreign code in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
