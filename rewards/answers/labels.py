"""Answers that are sets of labels: "dog, rain" or "A, C" (docs/method.md 1.5)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from avatar_rl.prompts.choices import choice_letter, option_texts
from avatar_rl.rewards.answers.text import f1, normalise

_ANDS = (
    "as well as|along with|together with|plus|et|und|och|og|ja|и|й|та|és|și|si|ve|dan|và|και|en|ir|un"
    "|sowie|و|और|एवं|तथा|ও|மற்றும்|และ|및|와|과"
)
#: Scripts whose words stand without spaces: a space there is a separator, too.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
#: Signs between labels, also where words do without spaces; "R&B" and "C++" are labels.
_SEPARATOR = re.compile(
    r"[,;/|\n\t、،·•؛।。]|\band\b|\s[&+]\s"
    rf"|\s(?:{_ANDS}|[yei])\s|(?<=[^\s,،;؛])\s+و(?=\S)|(?<=[{_UNSPACED}])\s+(?=[{_UNSPACED}])|[】」』)\]]\s*[【「『(\[]"
    r"|(?<=\S)(?:以及|还有|還有|和|与|與|及|跟|と|や|및|와|과(?=\s)|และ|ແລະ|និង|နှင့်)(?=\S)",
    re.IGNORECASE,
)
_BETWEEN_LETTERS = re.compile(
    rf"[\s,;/|&+.、·・→()\[\]{{}}<>*]+|\band\b|以及|和|与|與|及|跟|と|や|\b(?:{_ANDS})\b|와|과|및",
    re.IGNORECASE,
)
_BULLET = re.compile(
    r"^\s*(?:[-*•·–—✓✔✅☑▪◦‣►➢→+]\s*(?=\S)|\(?\d{1,2}[.):、]\s*|\[\d{1,2}\]\s*)", re.MULTILINE
)
_LETTER_BULLET = re.compile(r"^\s*\(?[a-h][.)]\s+", re.MULTILINE | re.IGNORECASE)
#: "(1) dog (2) cat", "1.狗 2.猫": a list in one line, when it counts from 1.
_COUNTED = re.compile(r"(?<![\w.])\(?([1-9]\d?)[.)、]\s*(?!\d)")
_CIRCLED = re.compile(r"[\u2460-\u2473\u2474-\u249b]")
_BRACKETS = "【】「」『』《》〈〉 "
_BOXED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_INTRODUCED = re.compile(
    r"^\W*(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:answers?|options?|choices?|labels?|letters?)"
    r"(?:\s+(?:are|is))?\s*:?|(?:正确)?(?:答案|选项)(?:是|为)?:?|选|both)\s*(?=[\w({\\])",
    re.IGNORECASE,
)
_CONFIRMED = re.compile(
    r"\s+(?:are|is)\s+(?:all\s+|both\s+)?(?:correct|right|true)\W*$", re.IGNORECASE
)


def _as_lines(text: str) -> str:
    """``text`` in NFKC, each entry of a numbered list on a line of its own."""
    plain = unicodedata.normalize("NFKC", _CIRCLED.sub("\n", text))
    if [int(number) for number in _COUNTED.findall(plain)][:2] == [1, 2]:
        plain = _COUNTED.sub("\n", plain)
    return plain


def parse_labels(text: str, options: Sequence[str]) -> frozenset[str]:
    """Normalised labels of "dog, cat", "- dog\n- cat", "狗、猫"; with options, what names one becomes
    its letter ("A, C", "AC", "A & C", "Options A and C" too)."""
    plain = _BULLET.sub("", _as_lines(text)).strip().strip("$*")
    if not options:
        plain = _LETTER_BULLET.sub("", plain)
    while (unboxed := _BOXED.sub(r"\1", plain)) != plain:
        plain = unboxed.strip("$ ")
    plain = plain.replace("\\{", "{").replace("\\}", "}")
    if options:
        plain = _CONFIRMED.sub("", _INTRODUCED.sub("", plain))
        if letters := _letters_only(plain, options):
            return letters
    labels = set()
    for piece in _SEPARATOR.split(plain):
        piece = _BULLET.sub("", piece)
        letter = choice_letter(piece, options) if options and piece.strip() else None
        label = letter or normalise(piece.strip(_BRACKETS))
        if label:
            labels.add(label)
    return frozenset(labels)


def _letters_only(text: str, options: Sequence[str]) -> frozenset[str] | None:
    """The options of an answer that is nothing but their letters: "AC", "ac", "(A)(C)", "A C"."""
    known = option_texts(options)
    if normalise(text) in known.values():
        return None  # the text of an option that happens to be made of letters
    parts = [part for part in _BETWEEN_LETTERS.split(text.strip(" .。")) if part]
    if len(parts) > 2 and any(part.isupper() for part in parts):  # "A y C", "A e C", "A i C"
        parts = [part for part in parts if part not in ("y", "e", "i", "a")]
    if len(parts) == 1 and 2 <= len(parts[0]) <= len(known):
        parts = list(parts[0])
    letters = [part.upper() for part in parts]
    if not letters or len(set(letters)) != len(letters) or not set(letters) <= known.keys():
        return None
    return frozenset(letters)


def multi_label_score(answer: str, truth: str, options: Sequence[str]) -> float:
    """F1 of the two label sets in [0, 1]; two empty sets agree."""
    given, expected = parse_labels(answer, options), parse_labels(truth, options)
    if not given and not expected:
        return 1.0
    return f1(len(given & expected), len(given), len(expected))
