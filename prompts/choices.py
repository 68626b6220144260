"""Options and their letters, as datasets and models write them (docs/method.md 1.5)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from avatar_rl.common.text import normalise

_OPTION = re.compile(r"\s*\(?([A-Za-z])[.):、]\s*(.*)", re.DOTALL)  # of text in NFKC
_LETTERED = re.compile(r"\s*[(（]?([A-Za-zＡ-Ｚａ-ｚ])(?:[)）.．:：、]|$)\s*(.*)", re.DOTALL)
_OPEN = r"(?:[\s*_$\"'`(\[<{「『【《“‘]|\\[(\[]|\\(?:boxed|text|textbf|mathrm|mathbf)\{){0,16}"
_NOUN = r"(?:answer|option|choice|letter)"
_KIND = r"(?:(?:final|correct|right|best|most likely|only|predicted)\s+){0,2}"
_IS = (
    r"(?:(?:'s|\s+(?:is|should be|would be|must be|will be|seems to be|was))"
    r"(?=[\s:*_$\"'`(\[<{\\]))?"
)
#: What stands before the letter in a closing sentence, in the languages that datasets are written
#: in. Each alternative ends where the letter begins.
_ENGLISH = (
    r"(?:(?:therefore|thus|hence|so|consequently|accordingly|overall|finally|in conclusion"
    r"|in summary|i (?:think|believe|would say))[,:]?\s+(?:that\s+)?){0,3}"
    r"(?:(?:(?:the|my|our)\s+)?" + _KIND + _NOUN + _IS + r"[\s:=*_–—-]{0,16}"
    r"|(?:it|this|that)(?:'s|\s+(?:is|must be|should be))\s+"
    r"|(?:(?:i|we)\s+(?:would\s+|will\s+)?)?(?:choose|select|pick|chose|selected|go with)\s+)"
    r"(?:(?:the\s+)?" + _KIND + _NOUN + r"[\s:]{1,4})?"
)
_CHINESE = (
    r"(?:(?:因此|所以|综上所述|综上|由此可知|最终)[,，:：]?)?"
    r"(?:(?:我的|我们的|本题的?)?(?:正确|最终|最佳|标准)?的?(?:答案|选项|选择)(?:应该|应当|应)?(?:是|为|选)?"
    r"|(?:我|我们|故|应该|应当|应|因此)?(?:选择|选项|选))(?:选项)?[\s:：]{0,4}"
)
_OTHERS = (
    r"(?:(?:正解|答え|回答|解答)(?:は|:)?|(?:정답|답)(?:은|는|:)?|(?:правильный\s+)?ответ\s*[:–—-]?"
    r"|(?:la\s+)?(?:respuesta|réponse|risposta)(?:\s+(?:correcta|correcte|corretta))?(?:\s+(?:est|es|è)\b)?"
    r"|(?:a\s+)?resposta(?:\s+(?:correta|certa))?(?:\s+é)?|(?:die\s+)?(?:richtige\s+)?antwort(?:\s+(?:ist|lautet))?)"
    r"[\s:]{0,4}"
)
_LEAD = re.compile(
    rf"{_OPEN}(?:(?:{_ENGLISH}|{_CHINESE}|{_OTHERS}){_OPEN})?"
    r"([A-Za-z])(?![A-Za-z])((?:\\[)\]]|[\s*_\"'`)\]}>$.:、–—」』】》”’-])*)",
    re.IGNORECASE,
)
_FURTHER = re.compile(
    r"(?<![A-Za-z])([A-Z])(?=\s*(?:[.,;:)\]/&\\}$*、。]|$|or\b|and\b|is\b|或|和|또는|か)|\s+[–—-]\s)"
)
_ARTICLE = re.compile(r"\W*(?:(?:so|thus|hence|therefore)\W+)?(?:it|this|that)\b", re.IGNORECASE)
_SAYS_SO = re.compile(
    r"is (?:the )?(?:correct|right)(?: (?:answer|option|choice|one))?"
    r"|(?:是|为)?(?:正确|对)的?(?:答案|选项)?|项|选项|です|が正解(?:です)?|입니다|이다|번"
)


def lettered(options: Sequence[str]) -> tuple[str, ...]:
    """Options as "A. red". Their own letters are kept: capitals as they stand ("(A) red",
    "A、红色"), small ones as capitals; without letters they are counted."""
    texts = [option.strip() for option in options]
    found = [_LETTERED.fullmatch(text) for text in texts]
    letters = [unicodedata.normalize("NFKC", match[1]) for match in found if match is not None]
    own = len(letters) == len(texts) == len({letter.upper() for letter in letters})
    if own and all(letter.isupper() for letter in letters):
        return tuple(texts)
    counted = [chr(ord("A") + position) for position in range(len(texts))]
    if own and [letter.upper() for letter in letters] == counted:
        texts = [match[2] if match is not None else "" for match in found]
    return tuple(f"{letter}. {text}".rstrip() for letter, text in zip(counted, texts, strict=True))


def split_option(option: str) -> tuple[str, str]:
    """("A", "red") of "A. red", "(A) red", "A、red" or "A: red"; no letter, ("", option)."""
    match = _LETTERED.fullmatch(option)
    if match is None:
        return "", option
    return unicodedata.normalize("NFKC", match[1]).upper(), match[2].strip()


def option_texts(options: Sequence[str]) -> dict[str, str]:
    """Letter -> normalised text; options without a letter are numbered A, B, ... by position."""
    table: dict[str, str] = {}
    for position, option in enumerate(options):
        match = _OPTION.match(unicodedata.normalize("NFKC", option))
        letter, text = (
            (match.group(1).upper(), match.group(2))
            if match
            else (chr(ord("A") + position), option)
        )
        table[letter] = normalise(text)
    return table


def choice_letter(answer: str, options: Sequence[str]) -> str | None:
    """The one option an answer names, as an upper-case letter; None when it names none or hedges.

    Accepts "B", "(b)", "B. red", "B - red", "Option B", "Therefore, the answer is B", "B is
    correct", "答案是B", "\\boxed{B}", "\\(B\\)", a full-width letter, and the text of exactly one
    option. Refuses "A or B", "not B", "A. B. C.", a letter with another option's text, and letters
    beyond the options."""
    answer = unicodedata.normalize("NFKC", answer)
    table = option_texts(options)
    text = normalise(answer)
    by_text = [letter for letter, option in table.items() if option == text]
    if len(by_text) == 1 and not (len(text) == 1 and text.isalpha()):
        return by_text[0]
    match = _LEAD.match(answer)
    if match is None:
        return None
    if match[1] == "a" and _ARTICLE.match(answer):
        return None  # "It is a dog"
    letter, rest = match.group(1).upper(), answer[match.end() :]
    if table and letter not in table:
        return None
    described = normalise(rest)
    if not described or table.get(letter) == described or _SAYS_SO.fullmatch(described):
        return letter
    separated = any(mark in match.group(2) for mark in ".):")
    hedged = described in table.values() or any(other != letter for other in _FURTHER.findall(rest))
    return (
        letter if separated and not hedged else None
    )  # without a mark, "A red ball" is an article
