"""Text compared with text: normal form, words, ROUGE F1 and word error rate (docs/method.md
1.5)."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

from avatar_rl.common.text import normalise

# Scripts written without spaces: each character is a word, as usual for character error rates.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\ua980-\ua9df\u1b00-\u1b7f"  # Javanese, Balinese
    "\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"  # Kana, Bopomofo, repetition marks
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\ua000-\ua4cf"  # Yi
)
#: Vowel signs and accents are part of their word (Hindi, Tamil, Arabic, Hebrew ...), which `\\w`
#: does not know: every mark of the basic plane.
_MARKS = "".join(chr(c) for c in range(0x0300, 0x10000) if unicodedata.category(chr(c))[0] == "M")
_JOINERS = "\u200c\u200d"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}](?:[^\W_{_UNSPACED}]|[{_MARKS}{_JOINERS}])*")
_OCR_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


#: What no eye can tell apart: soft hyphens, spaces of no width, curved and straight quotes.
_TYPOGRAPHY = dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF)) | {
    **dict.fromkeys(map(ord, "‘’‛ʼ′"), "'"),
    **dict.fromkeys(map(ord, "“”„‟″"), '"'),
}


def words(text: str) -> list[str]:
    """Case-folded alphanumeric words in any script; ASCII text splits exactly as in Google's
    rouge_score."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def f1(matches: float, predicted: int, expected: int) -> float:
    """Harmonic mean of matches/predicted and matches/expected; 0 where either is empty."""
    return 2.0 * matches / (predicted + expected) if predicted and expected else 0.0


def _ngram_f1(predicted: Sequence[str], expected: Sequence[str], n: int) -> float:
    left = Counter(zip(*(predicted[i:] for i in range(n)), strict=False))
    right = Counter(zip(*(expected[i:] for i in range(n)), strict=False))
    return f1((left & right).total(), left.total(), right.total())


def rouge_score(answer: str, truth: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L in [0, 1], without stemming (docs/method.md 1.5).

    A one-word truth has no bigram: ROUGE-2 is then left out of the mean, else its exact answer
    could not earn 1. A truth without any word (only symbols) is compared as normalised text."""
    predicted, expected = words(answer), words(truth)
    if not expected:
        return float(normalise(answer) == normalise(truth))
    scores = [_ngram_f1(predicted, expected, 1)]
    if len(expected) > 1:
        scores.append(_ngram_f1(predicted, expected, 2))
    scores.append(f1(LCSseq.similarity(predicted, expected), len(predicted), len(expected)))
    return sum(scores) / len(scores)


def ocr_score(answer: str, truth: str) -> float:
    """1 - min(1, word error rate), case folded, punctuation kept (docs/method.md 1.5). An empty
    truth wants an empty answer."""
    predicted, expected = (
        _OCR_WORD.findall(unicodedata.normalize("NFKC", text.translate(_TYPOGRAPHY)).casefold())
        for text in (answer, truth)
    )
    if not expected:
        return float(not predicted)
    return 1.0 - min(1.0, Levenshtein.distance(predicted, expected) / len(expected))
