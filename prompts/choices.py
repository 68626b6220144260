"""Options and their letters, as datasets and models write them (docs/method.md 1.5)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from avatar_rl.common.text import normalise

_OPTION = re.compile(r"\s*\(?([A-Za-z])[.):、]\s*(.*)", re.DOTALL)  # of text in NFKC
_LETTERED = re.compile(r"\s*[(（]?([A-Za-zＡ-Ｚａ-ｚ])(?:[)）.．:：、]|$)\s*(.*)", re.DOTALL)
_OPEN = (
    r"(?:[\s*_$\"'`(\[<{「『【《“‘#>=→⇒∴✓✔✅-]|\\[(\[]"
    r"|\\(?:boxed|text|textbf|mathrm|mathbf)\{){0,16}"
)
_NOUN = (
    r"(?:answer|ans\.?|option|choice|letter|response|solution|selection|prediction|correct|result)"
)
#: "The final answer", "the most appropriate option"; not what says that it is no answer.
_DENIED = (
    r"(?:in|un|im|non|not|wrong|false|least|less|worst|bad|second|other|another|alternative|possible"
    r"|eliminated|rejected|tempting|wrongly)"
)
_KIND = rf"(?:(?!{_DENIED})[a-z][a-z-]{{2,14}}\s+){{0,3}}"
_IS = (
    r"(?:(?:'s|\s+(?:is|should be|would be|must be|will be|seems to be|appears to be|was|has to be)"
    r"(?:\s+(?:definitely|clearly|most likely|likely|probably|simply|only|just|indeed"
    r"|therefore|thus|obviously|certainly|then))?)(?=[\s:*_$\"'`(\[<{\\]))?"
)
#: What stands before the letter in a closing sentence, in the languages that datasets are written
#: in. Each alternative ends where the letter begins.
_CONNECTIVE = (
    r"(?:only|just|therefore|thus|hence|so|consequently|accordingly|overall|finally|in conclusion"
    r"|in summary|to conclude|clearly|obviously|evidently|indeed|okay|ok|yes|well|ultimately"
    r"|as a result|i(?:'d| would)? (?:think|believe|say)|in my opinion"
    r"|based on (?:the|this|these) [\w ]{1,40}"
    r"|given (?:the|this|these) [\w ]{1,40}|according to (?:the|this) [\w ]{1,40})"
)
_ENGLISH = (
    rf"(?:{_CONNECTIVE}[,:]?\s+(?:that\s+)?){{0,3}}"
    r"(?:(?:(?:the|my|our)\s+)?" + _KIND + _NOUN + _IS + r"[\s:=*_–—-]{0,16}"
    r"|(?:it|this|that)(?:'s|\s+(?:is|must be|should be))\s+(?:only\s+|just\s+)?"
    r"|(?:(?:i|we)(?:'d|'ll)?\s+(?:would\s+|will\s+|should\s+|must\s+)?)?"
    r"(?:choose|select|pick|chose|selected|picked|go with|answer)[\s:]{1,4})"
    r"(?:(?:the\s+)?" + _KIND + _NOUN + r"[\s:]{1,4})?"
    rf"|(?:{_CONNECTIVE}[,:]?\s+(?:that\s+)?){{1,3}}"
)
_CHINESE = (
    r"(?:(?:因此|所以|综上所述|综上|由此可知|最终|从而|显然|可知|故|则|即|因而|那么)[,，:：]?){0,2}"
    r"(?:(?:我的|我们的|本题的?|该题的?|此题的?)?(?:正确|最终|最佳|标准|参考|最合适|最恰当)?的?"
    r"(?:答案|选项|选择)(?:应该|应当|应)?(?:是|为|选)?"
    r"|正确的(?:答案|选项|选择)?(?:应该|应当|应)?(?:是|为)"
    r"|(?:我|我们|本题|该题|此题|故|应该|应当|应|因此|则|即)?(?:应该|应当|应)?(?:选择|选项|选))(?:选项)?[\s:：]{0,4}"
)
#: The word for "answer" with what may stand before and behind it.
_ANSWERS = (
    r"(?:正解|答え|回答|解答)(?:は|:)?",
    r"(?:정답|답변|답)(?:은|는|:)?",
    r"(?:правильный\s+|верный\s+)?ответ\s*[:–—-]?",
    r"(?:правильна\s+)?відповідь\s*[:–—-]?",
    r"(?:la\s+)?(?:respuesta|réponse|risposta)(?:\s+(?:correcta|correcte|corretta))?(?:\s+(?:est|es|è)\b)?",
    r"(?:la\s+)?bonne\s+réponse(?:\s+est)?",
    r"(?:a\s+)?resposta(?:\s+(?:correta|certa))?(?:\s+é)?",
    r"(?:die\s+)?(?:richtige\s+|korrekte\s+)?(?:antwort|lösung)(?:\s+(?:ist|lautet))?",
    r"(?:het\s+)?(?:juiste\s+)?antwoord(?:\s+is)?",
    r"(?:(?:det\s+)?(?:rätta|rätt|korrekta|riktige|rigtige)\s+)?svar(?:et)?(?:\s+(?:är|er))?",
    r"(?:oikea\s+)?vastaus(?:\s+on)?",
    r"(?:správná\s+|správna\s+)?odpověď(?:\s+je)?|(?:správna\s+)?odpoveď(?:\s+je)?",
    r"(?:poprawna\s+|prawidłowa\s+)?odpowiedź(?:\s+to)?",
    r"(?:doğru\s+)?(?:cevap|yanıt)",
    r"(?:câu trả lời|đáp án)(?:\s+đúng)?(?:\s+(?:là|nhất là))?",
    r"jawaban(?:nya)?(?:\s+(?:yang\s+)?(?:benar|tepat))?(?:\s+(?:adalah|ialah))?",
    r"(?:răspunsul|răspuns)(?:\s+corect)?(?:\s+este)?",
    r"(?:a\s+)?(?:helyes\s+)?válasz",
    r"(?:η\s+)?(?:σωστή\s+)?απάντηση(?:\s+είναι(?:\s+η)?)?",
    r"(?:الإجابة|الجواب)(?:\s+(?:الصحيحة|الصحيح))?(?:\s+(?:هي|هو))?",
    r"(?:התשובה|תשובה)(?:\s+הנכונה)?(?:\s+היא)?",
    r"(?:پاسخ|جواب)(?:\s+(?:صحیح|درست))?",
    r"(?:सही\s+)?(?:उत्तर|जवाब)(?:\s+है)?",
    r"(?:সঠিক\s+)?উত্তর(?:\s+হল)?",
    r"(?:சரியான\s+)?(?:பதில்|விடை)",
    r"คำตอบ(?:ที่ถูกต้อง)?(?:คือ)?|ตอบ",
)
_OTHERS = unicodedata.normalize("NFKC", rf"(?:(?:{'|'.join(_ANSWERS)})[\s:]{{0,4}})")
_LEAD = re.compile(
    rf"{_OPEN}(?:(?:{_ENGLISH}|{_CHINESE}|{_OTHERS}){_OPEN})?"
    r"([A-Za-z])(?![A-Za-z])((?:\\[)\]]|[\s*_\"'`)\]}>$.:、–—」』】》”’-])*)",
    re.IGNORECASE,
)
_FURTHER = re.compile(
    r"(?<![A-Za-z])([A-Z])(?=\s*(?:[.,;:)\]/&\\}$*、。]|$|or\b|and\b|is\b|或|和|또는|か)|\s+[–—-]\s)"
)
#: "B because ...", "B, since ...": the reason is no part of the answer.
_REASON = re.compile(
    r"\W*(?:is (?:correct|right)\W+)?(?:because|since|as|given that|due to|for)\b", re.IGNORECASE
)
#: Words that take a statement back, or name more than one option.
_HEDGE = re.compile(
    r"\b(?:not|no|never|neither|nor|or|either|wrong|incorrect|false|except|unlikely|but|however|wait"
    r"|maybe|perhaps|unless|instead|rather|both|rule[ds]? out|eliminat\w*|actually)\b|n't\b"
    r"|不|没|非|错|或|除|但|而不|ない|아니|нет|\bне\b",
    re.IGNORECASE,
)
#: An answer that is stated at the end of a sentence or two of reasons.
_STATED = re.compile(
    rf"(?<![A-Za-z])(?:(?:the|my|our)\s+{_KIND}(?:answer|option|choice|letter)"
    r"(?:'s|\s+(?:is|should be|would be|must be|will be))"
    r"|(?:i|we)(?:'d|'ll)?\s+(?:would\s+|will\s+)?"
    r"(?:think|believe|choose|select|pick|go with|say)"
    r"|答案(?:应该|应当|应)?(?:是|为|选)|故选|因此选|所以选)"
    r"(?:\s+(?:it is|it's|that it is))?[\s:：]{0,3}"
    r"(?:(?:the\s+)?(?:answer|option|choice|letter)(?:\s+is)?\s+)?"
    rf"{_OPEN}([A-Za-z])(?![A-Za-z])",
    re.IGNORECASE,
)
_MOST_REASONS = 400
_LEAD_TEXT = re.compile(
    rf"{_OPEN}(?:{_CONNECTIVE}[,:]?\s+(?:that\s+)?){{0,3}}"
    rf"(?:(?:the|my|our)\s+{_KIND}(?:answer|option|choice)"
    r"(?:\s+(?:is|should be|would be|must be)|\s*:)\s*"
    r"|(?:it|this|that)(?:'s|\s+(?:is|was))\s+|答案(?:是|为|:)\s*|选择?)",
    re.IGNORECASE,
)
#: What only changes how an answer looks.
_TAG = re.compile(
    r"<(b|i|u|em|strong|span|p|font|mark|code|div)(?:\s[^<>]{0,80})?>([^<>]*)</\1>", re.IGNORECASE
)
_BREAK = re.compile(r"<br\s?/?>", re.IGNORECASE)
_NUMBER_ALONE = re.compile(r"\W*(\d{1,2})(?:번|番)?\W*")
_OWN_NUMBER = re.compile(r"\W*(\d{1,2})(?:[.):、]\s*|\s+)(?=\D)")
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

    Accepts "B", "(b)", "<b>B</b>", "only B", "B. red", "B - red", "Option B", "Therefore, the
    answer is B", "B is correct", "答案是B", "\\boxed{B}", "\\(B\\)", a full-width letter, the text
    of exactly one option, and its number where options carry numbers ("② green"). Refuses "A or B",
    "not B", "A. B. C.", a letter with another option's text, and letters beyond the options."""
    answer = _unformatted(unicodedata.normalize("NFKC", answer))
    table = option_texts(options)
    if numbered := _numbered(answer, table):
        return numbered
    text = normalise(answer)
    by_text = [letter for letter, option in table.items() if option == text]
    if len(by_text) == 1 and not (len(text) == 1 and text.isalpha()):
        return by_text[0]
    if lead := _LEAD_TEXT.match(answer):  # "The answer is the green ball."
        stated = normalise(answer[lead.end() :])
        named = [letter for letter, option in table.items() if option == stated]
        if len(named) == 1 and len(stated) > 1:
            return named[0]
    match = _LEAD.match(answer)
    if match is None:
        return _stated(answer, table)
    if match[1] == "a" and _ARTICLE.match(answer):
        return None  # "It is a dog"
    letter, rest = match.group(1).upper(), answer[match.end() :]
    if table and letter not in table:
        return None
    described = normalise(rest)
    if not described or table.get(letter) == described or _SAYS_SO.fullmatch(described):
        return letter
    separated = any(mark in match.group(2) for mark in ".):")
    if "-" not in match[2] and _REASON.match(rest) and not _HEDGE.search(rest):
        separated = True
    hedged = described in table.values() or any(other != letter for other in _FURTHER.findall(rest))
    return (
        letter if separated and not hedged else None
    )  # without a mark, "A red ball" is an article


def _unformatted(answer: str) -> str:
    plain = _BREAK.sub(" ", answer)
    return _TAG.sub(r"\2", _TAG.sub(r"\2", plain))  # "<p><b>B</b></p>"


def _numbered(answer: str, table: Mapping[str, str]) -> str | None:
    """The option of "②" or "2." where the options carry numbers of their own, in order."""
    match = _NUMBER_ALONE.fullmatch(answer)
    if match is None:
        return None
    own = [_OWN_NUMBER.match(text) for text in table.values()]
    numbers = [int(found[1]) if found else 0 for found in own]
    if numbers != list(range(1, len(numbers) + 1)) or int(match[1]) not in numbers:
        return None
    return list(table)[int(match[1]) - 1]


def _stated(answer: str, table: Mapping[str, str]) -> str | None:
    """The option of "The ball is green, so the answer is B.": stated once, and nothing in the text
    takes it back or names another."""
    if len(answer) > _MOST_REASONS or _HEDGE.search(answer):
        return None
    letters = {match[1].upper() for match in _STATED.finditer(answer) if match[1] != "a"}
    if len(letters) != 1:
        return None
    (letter,) = letters
    others = {other for other in _FURTHER.findall(answer) if other in table} - {letter}
    return letter if not others and (not table or letter in table) else None
