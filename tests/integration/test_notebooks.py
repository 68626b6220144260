"""The notebooks of the documentation run from their first cell to their last, and print what is
saved in them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("nbclient", "nbformat", "ipykernel")),
    reason="needs nbclient and ipykernel: `make docs` installs them",
)


def printed(cells: list[dict[str, Any]]) -> list[str]:
    """What the cells wrote: a cell's lines as one text, however often the kernel flushed them on a
    busy machine; pictures as a word."""
    found = []
    for cell in cells:
        lines = ""
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                if output["name"] == "stdout":
                    lines += "".join(output["text"])
            elif "image/png" in output.get("data", {}):
                found.append("a picture")
            else:
                found.append("".join(output["data"]["text/plain"]))
        if lines:
            found.append(lines)
    return found


@pytest.mark.parametrize("name", ["own_reward", "read_a_run"])
def test_a_notebook_runs_and_prints_what_it_shows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    file = FOLDER / f"{name}.ipynb"
    saved = printed(json.loads(file.read_text())["cells"])
    notebook = nbformat.read(file, 4)
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place).execute()
    assert printed(notebook.cells) == saved
    assert len(saved) >= 5
