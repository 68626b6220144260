"""The ground truth of a row, without what a format of answers or turns left around it."""

from __future__ import annotations

import re

from avatar_rl.common.errors import InputError
from avatar_rl.common.text import normalise, shortened
from avatar_rl.prompts.choices import option_texts
from avatar_rl.prompts.record import ProblemType

#: Tags as they are written: "<Answer >", "&lt;answer&gt;" too.
_SPELLED_TAG = re.compile(
    r"(?:<|&lt;)\s*(/?)\s*(?:final[_ ])?(answer|think|thinking)\s*(?:>|&gt;)", re.IGNORECASE
)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
#: What a format of answers or turns left behind, and which is nobody's answer.
_LEFTOVER = re.compile(
    r"</?(?:ans|output|response|result|solution|reason|reasoning|thought|analysis|reflection)>",
    re.IGNORECASE,
)
#: A whole answer inside a pair of tags or a fence of code.
_WRAPPED = re.compile(
    r"\A\s*(?:<([a-z][\w-]*)>.*</\1>|\[([a-z][\w-]*)\].*\[/\2\]|(`{3}).*`{3})\s*\Z",
    re.DOTALL | re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"\A\W*(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|ans)\.?\s*(?:is\b|:|=)\s*\w",
    re.IGNORECASE,
)
_CHANNEL = re.compile(r"\A.*<\|message\|>", re.DOTALL)  # all but the last message of gpt-oss
_THINK = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_THINK_TAG = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
#: What ends a turn in the chat formats that data were exported from.
_STOP = re.compile(
    r"(?:<\|[\w-]{1,30}\|>|</s>|\A\s*<s>|<\uff5c[^<>]{1,40}\uff5c>|\[/?INST\]"
    r"|<(?:eos|bos|pad|eot|im_start|im_end|start_of_turn|end_of_turn|end_of_utterance)>)"
)
_BRACES = r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*"  # three deep
_BOXED = re.compile(rf"\\boxed\{{({_BRACES})\}}")
_BETWEEN_LABELS = re.compile(r"\s*[,;，；、\n|/&+]\s*|\s+and\s+")
_NUMBERS = (ProblemType.NUMERICAL, ProblemType.REGRESSION)
_TEXTS = (ProblemType.FREE_FORM, ProblemType.MULTI_LABEL)


def unwrap(text: str) -> str:
    """What the last <answer> tag holds, closed or not, or the text without its <think> part where
    there is none; tokens that end a turn are left out."""
    plain = _plain(text)
    found = [inside.strip() for inside in _ANSWER.findall(plain) if inside.strip()]
    return (found[-1] if found else _ANSWER_TAG.sub("", _THINK.sub("", plain))).strip()


def same_answer(text: str) -> str:
    """A normal form in which two columns that give one answer are equal: of a worked solution its
    result."""
    answer = unwrap(text).rpartition("####")[2]
    boxed = _BOXED.findall(answer)
    return normalise(boxed[-1] if boxed else answer)


def _plain(text: str) -> str:
    """``text`` without what ends turns, its answer and think tags in their usual spelling."""
    plain = _STOP.sub("", _CHANNEL.sub("", text))
    return _SPELLED_TAG.sub(lambda tag: f"<{tag[1]}{tag[2].lower()}>", plain)


def plain_truth(text: str, where: str) -> str:
    """``text`` unwrapped. Raises InputError where tags leave more or less than one answer."""
    given = {normalise(inside) for inside in _ANSWER.findall(_plain(text)) if inside.strip()}
    if len(given) > 1:
        raise InputError(
            where,
            f"the answer is tagged several times: {shortened(', '.join(sorted(given)))}",
            "keep the one that is meant",
        )
    answer = unwrap(text)
    if tag := _LEFTOVER.search(answer):
        raise _leftover(where, text, f"holds the tag {tag[0]}")
    if _THINK_TAG.search(answer):
        raise InputError(
            where,
            f"the answer {shortened(text)!r} has a think tag without its partner",
            "give the ground truth alone, or close the tags",
        )
    whole = _BOXED.fullmatch(answer.strip("$ "))
    answer = whole[1].strip() if whole else answer
    if not answer:
        raise InputError(where, "the answer is empty", "give the ground truth, or drop the row")
    return answer


def result(answer: str, kind: ProblemType, where: str) -> str:
    """The result of a worked solution: what stands behind "####" (of a number or a choice) or in
    the only box. Raises InputError for what is wrapped in something else."""
    if "####" in answer and kind in (*_NUMBERS, ProblemType.MULTIPLE_CHOICE):
        answer = answer.rpartition("####")[2].strip()
        if not answer:
            raise InputError(
                where, "the answer ends with ####", "give the number behind it, or drop the row"
            )
    boxed = {content.strip() for content in _BOXED.findall(answer)}
    if len(boxed) > 1:
        raise InputError(
            where,
            f"the answer boxes several values: {shortened(', '.join(sorted(boxed)))}",
            "give the one that is meant",
        )
    answer = (boxed.pop() or answer) if boxed else answer
    if wrapped := _WRAPPED.match(answer):
        raise _leftover(
            where, answer, f"is wrapped in {wrapped[1] or wrapped[2] or 'a code fence'}"
        )
    if kind in _TEXTS and _SENTENCE.match(answer):
        raise _leftover(where, answer, "begins as a sentence about it")
    return answer


def check_labels(answer: str, options: tuple[str, ...], where: str) -> None:
    """Raises InputError for a label that is none of the options, which no answer could earn."""
    texts = option_texts(options)
    if any(_BETWEEN_LABELS.search(text) for text in texts.values()):
        return
    for label in _BETWEEN_LABELS.split(answer):
        folded = normalise(label)
        known = folded in texts.values() or set(folded.upper()) <= texts.keys()  # "AC"
        if not known and folded.isascii() and folded.isalpha():
            raise InputError(
                where,
                f"the label {shortened(label)!r} is none of the options "
                f"{shortened(str(list(options)))}",
                "correct either",
            )


def thought(text: str) -> str | None:
    """What the first <think> tag holds."""
    found = _THINK.search(text)
    return found[1].strip() if found else None


def _leftover(where: str, text: str, what: str) -> InputError:
    return InputError(
        where, f"the answer {shortened(text)!r} {what}", "give the ground truth alone"
    )
