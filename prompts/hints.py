"""Does a hint give the answer away? A hint is a strategy, never the answer (docs/method.md 1.4)."""

from __future__ import annotations

import re

from avatar_rl.prompts.choices import split_option
from avatar_rl.prompts.record import ProblemType, Prompt

# "one" is left out: in "one by one" or "the one that moves" it is no number.
_WORDS = (
    "zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBERS = {str(n): word for n, word in zip((0, *range(2, 21)), _WORDS.split(), strict=True)}
_SYNONYMS = (
    ("center", "centre", "middle"),
    ("left", "left-hand", "leftmost"),
    ("right", "right-hand", "rightmost"),
    ("disc", "disk", "circle"),
    ("gray", "grey"),
    ("yes", "true"),
    ("no", "false"),
)
#: Answers that are everyday words: they only leak where they are stated as the answer.
_EVERYDAY = {"yes", "no", "true", "false", "a", "i", "1", "one", "none"}


def hint_leaks(prompt: Prompt) -> bool:
    """Whether the hint gives the answer away (docs/method.md 1.4): says it, in words, digits or a
    synonym, or singles out the right option; of an answer of several slots or labels, all values or
    one slot with its value."""
    return bool(prompt.hint) and text_leaks(prompt, prompt.hint or "")


def text_leaks(prompt: Prompt, text: str) -> bool:
    """``hint_leaks`` of a hint that the prompt does not have yet."""
    if prompt.problem_type is ProblemType.MULTIPLE_CHOICE:
        if _names_letter(text, prompt.answer):
            return True
        options = [split_option(option) for option in prompt.options]
        # a hint that names other options too only restates the choice
        return {letter for letter, option in options if _says(text, option)} == {prompt.answer}
    if _says(text, prompt.answer):
        return True
    parts = [part.strip() for part in re.split(r"[/;|,\n]", prompt.answer) if part.strip()]
    if prompt.problem_type is ProblemType.LOCALISATION:
        pairs = [
            tuple(word.strip() for word in part.split(":", 1)) for part in parts if ":" in part
        ]
        values = {pair[1] for pair in pairs}
        told = [all(_says(text, word) for word in pair) for pair in pairs]
        return any(told) or (bool(values) and all(_says(text, value) for value in values))
    if prompt.problem_type is ProblemType.MULTI_LABEL and len(parts) > 1:
        return all(_says(text, part) for part in parts)
    return False


def _names_letter(text: str, letter: str) -> bool:
    """Whether ``text`` says "(B)", "option B" or "the answer is B"; a mere "A" may be an
    article."""
    letter = re.escape(letter)
    spoken = rf"\b(?i:options?|answer|choice|choose|pick)(?i:\s+is)?:?\s+\(?{letter}\b"
    return re.search(rf"\({letter}\)|{spoken}", text) is not None


def _says(text: str, phrase: str) -> bool:
    """Whether ``text`` holds ``phrase`` or a spelling of it as whole words, whatever case and
    spacing."""
    wanted, heard = re.sub(r"^(?:the|an?) (?=.)", "", _plain(phrase)), _plain(text)
    if not wanted:
        return False
    if wanted in _EVERYDAY:
        return (
            re.search(
                rf"\b(?:answer|result)(?: is| must be| should be|:)? {re.escape(wanted)}\b", heard
            )
            is not None
        )
    return any(
        re.search(rf"(?<![\w.]){re.escape(form)}(?!\w|\.\d)", heard) for form in _spellings(wanted)
    )


def _plain(text: str) -> str:
    """Lower case, tags and quotes gone, white space single, a trailing full stop and zero decimals
    dropped."""
    text = re.sub(r"[\s_*`\"'<>]+", " ", text.lower()).strip().rstrip(".")
    return re.sub(r"(?<=\d)\.0+(?!\d)", "", text)


def _spellings(phrase: str) -> list[str]:
    forms = {phrase, _NUMBERS.get(phrase, phrase)}
    forms |= {digits for digits, word in _NUMBERS.items() if word == phrase}
    for same in _SYNONYMS:
        forms |= set(same) if phrase in same else set()
    return sorted(forms)
