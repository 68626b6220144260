"""`avatar data classify`: each sample into one category of a taxonomy, by a language model that is
shown the question alone (docs/method.md 2.4)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from avatar_rl.cluster.annotation.asking import (
    Asking,
    Budget,
    EndpointOptions,
    TeacherReport,
    annotate,
)
from avatar_rl.cluster.annotation.funnel import NONE, TAXONOMY, write_step
from avatar_rl.common.chat_client import ChatClient, Messages, NoReply
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import ConfigError
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.judges.base import ContentPart

#: Fifteen, as the paper has; it does not list its own, so these names are ours. Another taxonomy
#: is a file of lines "name: what belongs to it".
CATEGORIES: dict[str, str] = {
    "action": "what somebody or something does",
    "attribute": "colour, size, material, look of something",
    "object": "which thing is there",
    "person": "who somebody is, what they wear or feel",
    "place": "where it happens, what the surroundings are",
    "spatial_relation": "where things stand to each other",
    "motion": "which way, how fast, along which path",
    "temporal_order": "what comes before or after, or at the same time",
    "duration": "how long something lasts, when it starts or ends",
    "counting": "how many things or how often",
    "cause": "why something happens, what follows from it",
    "speech": "what is said, and how",
    "sound_event": "which sound is heard, what makes it",
    "music": "instruments, melody, mood of music",
    "text": "what can be read in the picture",
}
_LINE = re.compile(r"\s*([A-Za-z][\w-]*)\s*:\s*(\S.*?)\s*")


def read_categories(file: Path | None) -> dict[str, str]:
    """The taxonomy of a file, or ours. Raises ConfigError naming the line at fault."""
    if file is None:
        return CATEGORIES
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--categories {file} cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or match[1] in found or match[1] == NONE:
            raise ConfigError(
                f"--categories {file}:{number}: {line!r} is no line 'name: what belongs to it' with "
                f"a name of its own (and not {NONE!r})"
            )
        found[match[1]] = match[2]
    if len(found) < 2:
        raise ConfigError(f"--categories {file} names {len(found)} categories: give at least two")
    return found


def classify(options: EndpointOptions, categories: Path | None) -> int:
    """Exit code as of ``annotate``."""

    def said(counts: Counter[str]) -> str:
        return (
            f"{counts['written']} samples classified, {counts['kept']} had a category, "
            f"{counts['done_before']} done before, {counts['failed']} without a usable reply"
        )

    known = read_categories(categories)
    return annotate(
        options, partial(classify_dataset, categories=known), doing="classifying", said=said
    )


def classify_dataset(
    dataset: Path,
    out: Path,
    classifier: EndpointConfig,
    reader: DataConfig,
    *,
    progress: Callable[[int, int], None],
    categories: Mapping[str, str] = CATEGORIES,
    budget: Budget | None = None,
) -> TeacherReport:
    """Write the dataset's samples with ``extra.taxonomy`` to ``out``; see ``Asking.run``.

    A reply outside the taxonomy is none: it is asked again, and after all attempts the sample is
    not written."""

    def category_of(reply: str) -> str:
        text = reply.partition("</think>")[2] if reply.lstrip().startswith("<think>") else reply
        name = text.strip().strip("\"'`.*").strip().lower().replace(" ", "_")
        if name not in categories and name != NONE:
            raise ValueError(f"{name[:60]!r} is none of the categories")
        return name

    async def classified(
        client: ChatClient, prompt: Prompt, media: Sequence[ContentPart], counts: Counter[str]
    ) -> Prompt | None:
        if prompt.extra.get(TAXONOMY) in {*categories, NONE}:
            counts["kept"] += 1
            return prompt
        first, reminded = (category_messages(prompt, categories, r) for r in (False, True))
        category = await client.ask(prompt.id, first, reminded, category_of)
        if isinstance(category, NoReply):
            return None
        counts["written"] += 1
        return prompt.model_copy(update={"extra": prompt.extra | {TAXONOMY: category}})

    asking = Asking(classifier, "classifier", classified, budget=budget or Budget())
    report = asking.run(dataset, out, reader, progress)
    write_step("classify", dataset, out, {"unclassified": report.counts["failed"]})
    return report


def category_messages(prompt: Prompt, categories: Mapping[str, str], remind: bool) -> Messages:
    """The taxonomy, then question and options as data."""
    lines = "\n".join(f"{name}: {meaning}" for name, meaning in categories.items())
    instructions = (
        "You sort questions about videos with sound. The categories are:\n"
        f"{lines}\n{NONE}: none of these\nReply with the name of the one that fits best, and "
        "nothing else."
    )
    material = {"question": prompt.question, "options": list(prompt.options)}
    text = json.dumps(material, ensure_ascii=False)
    if remind:
        text += f"\n\nReply with one of these words alone: {', '.join([*categories, NONE])}."
    return [{"role": "system", "content": instructions}, {"role": "user", "content": text}]
