"""The documentation against the tree: what it names exists, what code cites is there, it reads
easily."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from avatar_rl.cluster.config import RunConfig
from avatar_rl.common.config import Section, subsection

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "prompts", "buffer_service", "rewards", "actors", "learner", "cluster")
FOLDERS = (*ROOMS, "benchmarks", "deploy", "docs", "recipes", "tests")
#: Everything a reader of the project is shown, and what of it is measured as prose.
PROSE = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *(ROOT / room / "README.md" for room in ("buffer_service", "rewards")),
    ]
)
PAGES = [*PROSE, ROOT / "CHANGELOG.md"]
#: The changelog tells of files that are gone.
CURRENT = PROSE
#: They show keys that are none here, on purpose.
WRONG_KEYS = ("docs/other-frameworks.md", "docs/mistakes.md")
LONGEST = 30  # words in a sentence that is still easy
LONG_SHARE = 0.03

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
NOT_A_SENTENCE_END = re.compile(r"\b(e\.g|i\.e|vs|cf|etc|Dr)\.$")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def sources() -> dict[Path, str]:
    """Text of every file of the project that is code or a recipe."""
    files = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".lua", ".yaml", ".yml", ".sbatch", ".conf")
    ]
    files += [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "avatar_rl/__init__.py"]
    return {path: text(path) for path in files}


@cache
def words_of_code() -> frozenset[str]:
    """Every identifier in the project's own code, tests left out."""
    found: set[str] = set()
    for path, content in sources().items():
        if path.relative_to(ROOT).parts[0] != "tests":
            found.update(re.findall(r"[A-Za-z_]\w*", content))
    return frozenset(found)


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's prose.

    Code blocks, tables, headings, comments and pictures are left out. A paragraph, a list item and
    a quoted block each end a sentence; inside one, so do ".", "!", "?" before white space and what
    begins a new one (a capital, a digit, code, a bracket, emphasis). Inline code counts as one
    word, a link as its text."""
    prose = re.sub(r"<!--.*?-->", "", FENCE.sub("\n\n", markdown), flags=re.DOTALL)
    blocks: list[str] = [""]
    for line in prose.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "|", "![")) or line.startswith("    "):
            blocks.append("")
        elif re.match(r"([-*>]|\d+\.) ", stripped):
            blocks.append(re.sub(r"^([-*>]|\d+\.) ", "", stripped))
        else:
            blocks[-1] += f" {stripped}"
    found = []
    for block in blocks:
        # Both may begin a sentence, whatever their own first letter.
        plain = LINK.sub(lambda link: link[1][:1].upper() + link[1][1:], CODE.sub("Code", block))
        start = 0
        for end in re.finditer(r"[.!?][)\"'*_\]]*\s+(?=[A-Z0-9\[(*\"'])", plain):
            if not NOT_A_SENTENCE_END.search(plain[: end.start() + 1]):
                found.append(plain[start : end.end()])
                start = end.end()
        found.append(plain[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def word_count(sentence: str) -> int:
    return len(re.findall(r"[^\s]*\w[^\s]*", sentence))


def test_the_sentence_counter_counts_what_it_says() -> None:
    page = (
        "# A heading is none\n\nOne two three. Four `a b c` [five six](x.md)!\n"
        "- An item, e.g. This one\n  goes on. Its second.\n\n"
        "| a | table |\n\n```\ncode. Code.\n```\n"
    )
    assert [word_count(sentence) for sentence in sentences(page)] == [3, 4, 7, 2]


def test_sentences_are_short() -> None:
    """At most 3 % of the sentences of README and docs have more than 30 words."""
    counted = [
        (word_count(sentence), path, sentence)
        for path in PROSE
        for sentence in sentences(text(path))
    ]
    long = [entry for entry in counted if entry[0] > LONGEST]
    worst = "\n".join(
        f"{count} {path.relative_to(ROOT)}: {sentence[:120]}"
        for count, path, sentence in sorted(long, key=lambda entry: -entry[0])
    )
    assert len(counted) > 500
    assert len(long) <= LONG_SHARE * len(counted), f"{len(long)} of {len(counted)}:\n{worst}"


@pytest.mark.parametrize("page", names(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    broken = []
    for _, target in LINK.findall(FENCE.sub("", text(path))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


#: Classes of other projects that our code does not use.
FOREIGN = {"WeightConverter"}


def missing_code(code: str) -> bool:
    """Whether inline code names a file, module or class that does not exist."""
    module = re.fullmatch(r"(?:python -m )?((?:avatar_rl|benchmarks|cluster)(?:\.\w+)+)", code)
    if module and code.startswith(("python", "avatar_rl")):
        return not resolves(module[1])
    # A file by its suffix, a folder by its slash: "learner/updates" is a metric.
    is_path = re.fullmatch(r"[\w.-]+(/[\w.*-]+)*(/|\.\w+)", code)
    if is_path and code.split("/")[0] in FOLDERS:
        return not list(ROOT.glob(code.rstrip("/")))
    if re.fullmatch(r"\w+\.(py|lua)", code):
        return not any(found.name == code for found in sources())
    if bench := re.search(r"make bench NAME=(\w+)", code):
        return not (ROOT / "benchmarks" / f"{bench[1]}.py").is_file()
    if re.fullmatch(r"(?:[A-Z][a-z0-9]+){2,}(?:\.\w+)?(?:\(.*\))?", code):
        known = words_of_code() | FOREIGN
        return any(word not in known for word in re.findall(r"\w+", code)[:2])
    return False


def resolves(dotted: str) -> bool:
    """Whether ``a.b.c`` is a module, or a name in the module ``a.b``."""
    parts = dotted.split(".")
    for depth in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:depth])
        file = (
            base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        )
        if file.is_file():
            rest = parts[depth:]
            return not rest or re.search(rf"\b{rest[0]}\b", text(file)) is not None
    return False


@pytest.mark.parametrize("page", names(CURRENT))
def test_what_is_named_exists(page: str) -> None:
    path = ROOT / page
    code = CODE.findall(FENCE.sub("", text(path)))
    saved = set(re.findall(r"<!-- walk: file (\S+) -->", text(path)))  # by the reader
    assert [name for name in code if name not in saved and missing_code(name)] == []


@pytest.mark.parametrize("page", names(PAGES))
def test_modules_that_are_named_exist(page: str) -> None:
    """``avatar_rl.a.b`` and ``from avatar_rl.a import b``, in prose and in code blocks."""
    content = text(ROOT / page)
    named = re.findall(r"\bavatar_rl(?:\.\w+)+", content)
    for module, imports in re.findall(r"from (avatar_rl[\w.]*) import ([\w, ]+)", content):
        named += [f"{module}.{name.strip()}" for name in imports.split(",")]
    assert [name for name in named if not resolves(name)] == []


@pytest.mark.parametrize("page", names(CURRENT))
def test_examples_call_what_exists(page: str) -> None:
    """Functions, classes, attributes and keyword arguments in blocks of Python."""
    examples = re.findall(r"^```python\n(.*?)^```", text(ROOT / page), re.MULTILINE | re.DOTALL)
    tree = [ast.parse(example) for example in examples]
    used: set[str] = set()
    for node in (node for one in tree for node in ast.walk(one)):
        match node:
            case ast.Call(func=ast.Name(id=name)):
                used.add(name)
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                used.add(name)
    own = {node.name for one in tree for node in ast.walk(one) if isinstance(node, ast.FunctionDef)}
    assert sorted(used - own - words_of_code()) == []


#: Dotted code that begins like a recipe's key and is none.
NOT_KEYS = re.compile(r"buffer\.(requests|replay|stats|control)\b|model\.load_weights")
FILE = re.compile(r"\.(md|py|yaml|json|jsonl|png|html|log)$")


def keys_in(code: str) -> list[str]:
    """What inline code names of a recipe: ``loop.steps``, ``--loop.steps 3``, ``loop.steps: 3``."""
    dotted = re.findall(r"(?:^|--|[\s{])([a-z_]+(?:\.[a-z_*]+)+)(?=$|[\s:,}])", code)
    return [
        key
        for key in dotted
        if key.split(".")[0] in RunConfig.model_fields
        and not FILE.search(key)
        and not NOT_KEYS.match(key)
    ]


def is_key(key: str) -> bool:
    """Whether a recipe may have ``key``, or could until lately."""
    section: type[Section] | None = RunConfig
    *path, last = key.split(".")
    for name in path:
        section = None if section is None else subsection(section, name)
    if section is None:
        return False
    return last == "*" or last in {*section.model_fields, *section.ALIASES, *section.REMOVED}


@pytest.mark.parametrize("page", [page for page in names(CURRENT) if page not in WRONG_KEYS])
def test_recipe_keys_exist(page: str) -> None:
    code = CODE.findall(FENCE.sub("", text(ROOT / page)))
    assert [key for one in code for key in keys_in(one) if not is_key(key)] == []


def test_a_key_that_does_not_exist_is_noticed() -> None:
    assert keys_in("--loop.steps 3 --loop.gone 1") == ["loop.steps", "loop.gone"]
    assert [is_key(key) for key in ("loop.steps", "loop.gone", "gone.steps")] == [
        True,
        False,
        False,
    ]


def test_a_name_that_does_not_exist_is_noticed() -> None:
    for wrong in (
        "cluster/gone.py",
        "gone.py",
        "avatar_rl.learner.gone.Thing",
        "python -m cluster.gone",
        "make bench NAME=gone",
        "GoneClass.method",
    ):
        assert missing_code(wrong), wrong
    for right in (
        "cluster/cli.py",
        "avatar_rl.learner.config.ObjectiveConfig",
        "python -m cluster.cli",
        "ObjectiveConfig",
        "loop.steps",
    ):
        assert not missing_code(right), right


def test_the_sections_that_are_cited_exist() -> None:
    """``docs/method.md 1.2`` in code, recipes and docs has a heading of that number."""
    method = text(ROOT / "docs/method.md")
    there = set(re.findall(r"^#+ (\d(?:\.\d)?) ", method, re.MULTILINE))
    assert {"1.1", "1.7", "2.4", "3", "4"} <= there
    wrong = []
    cited = 0
    for path, content in (*sources().items(), *((page, text(page)) for page in PAGES)):
        if path == Path(__file__):
            continue
        flat = re.sub(r"\s*\n\s*(?:#|--|//)?:?\s*", " ", content)
        for match in re.finditer(r"docs/method\.md[,]?((?:(?:,| and| to)? \d(?:\.\d)?\b)*)", flat):
            sections = re.findall(r"\d(?:\.\d)?", match[1])
            cited += len(sections)
            wrong += [(names([path])[0], number) for number in sections if number not in there]
    assert wrong == []
    assert cited > 80


def test_files_that_are_cited_exist() -> None:
    """``docs/x.md`` in code, recipes and docs is a page."""
    wrong = []
    for path, content in (*sources().items(), *((page, text(page)) for page in PAGES)):
        if path != Path(__file__):
            for cited in set(re.findall(r"docs/[\w-]+\.md", content)):
                if not (ROOT / cited).is_file():
                    wrong.append((names([path])[0], cited))
    assert wrong == []


def test_nothing_cites_what_a_reader_cannot_open() -> None:
    """No notes outside the repository, no path of the machine it was written on."""
    unknown = re.compile(
        r"\b(?:METHOD|DESIGN|STACK|HOUSE)\b(?:\.md| \d)|/work/|/tmp/old|shared/[A-Z]{4,}"
    )
    found = [
        (names([path])[0], match[0])
        for path, content in (*sources().items(), *((page, text(page)) for page in PAGES))
        if path != Path(__file__)
        for match in unknown.finditer(content)
    ]
    assert found == []
