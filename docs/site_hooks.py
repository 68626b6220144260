"""Hooks of mkdocs.yml: what the site shows that does not lie in docs/.

The pages are written for a reader of the repository. README, CONTRIBUTING and the rooms' own pages
lie elsewhere, pages link to code and recipes, and notebooks are no Markdown. Here each of them
becomes a page or a file of the site, and links follow."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: File of the repository -> page of the site.
BESIDE = {
    "README.md": "project/start.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "rewards/README.md": "project/rewards.md",
    "buffer_service/README.md": "project/buffer_service.md",
}
FENCE = re.compile(r"^(?:```.*?^```|~~~.*?^~~~)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
#: A line of api.md that is a public name alone.
API_LINE = re.compile(r"^- `(avatar_rl(?:\.\w+)+)`$", re.MULTILINE)
#: Python-Markdown needs an empty line before a list.
TIGHT_LIST = re.compile(
    r"^(?![ \t]*(?:[-*|#>]|\d+\.)[ \t])(\S.*)\n(?=(?:[-*]|\d+\.) )", re.MULTILINE
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for source, page in BESIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        page = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(notebook)))
    for file in sorted(linked_files()):
        place = site_place(file)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=(ROOT / file).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    if here == "api.md":
        markdown = API_LINE.sub(r"::: \1", markdown)
    parts, start = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_prose(markdown[start : fence.start()], here), fence[0]]
        start = fence.end()
    return "".join([*parts, _prose(markdown[start:], here)])


def _prose(markdown: str, here: str) -> str:
    return TIGHT_LIST.sub("\\1\n\n", relinked(markdown, repository_place(here), here))


def repository_place(page: str) -> str:
    """Of a page of the site: its file in the repository."""
    known = {there: here for here, there in BESIDE.items()}
    return known.get(page, f"docs/{page}")


def site_place(file: str) -> str:
    """Of a file of the repository: its place in the site. Code gets a name that opens as text."""
    if file in BESIDE:
        return BESIDE[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/").replace(".ipynb", ".md")
    name = f"files/{file}"
    return name if Path(file).suffix in (".png", ".svg", ".json", ".html") else f"{name}.txt"


def relinked(markdown: str, source: str, here: str) -> str:
    """Links between files of the repository, as links between places of the site."""

    def moved(link: re.Match[str]) -> str:
        if re.match(r"[a-z]+:", link[2]):
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if not (ROOT / target).is_file():
            return link[0]  # mkdocs names it
        place = posixpath.relpath(site_place(target), posixpath.dirname(here) or ".")
        return f"{link[1]}{place}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)


def linked_files() -> set[str]:
    """Files outside docs/ that pages link to."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / page for page in BESIDE)]
    found = set()
    for page in pages:
        folder = page.relative_to(ROOT).parent.as_posix()
        for link in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
            target = posixpath.normpath(posixpath.join(folder, link[2]))
            outside = not target.startswith(("docs/", "..")) and target not in BESIDE
            if outside and not re.match(r"[a-z]+:", link[2]) and (ROOT / target).is_file():
                found.add(target)
    return found


def notebook_page(file: Path) -> str:
    """A notebook as Markdown: texts, code, and what the code printed or drew."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell["outputs"] if (shown := _shown(output))]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, object]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text'])}```"  # type: ignore[arg-type]
    data = output.get("data")
    assert isinstance(data, dict)
    if "image/svg+xml" in data:
        return f'<div class="drawing">{"".join(data["image/svg+xml"])}</div>'
    if "image/png" in data:
        return f'<img alt="what the code drew" src="data:image/png;base64,{data["image/png"]}">'
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return f"```text\n{''.join(data['text/plain'])}\n```"
