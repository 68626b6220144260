"""How the scripts of the buffer are put together."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from avatar_rl.buffer_service.redis.scripting import script

FOLDER = files("avatar_rl.buffer_service.redis") / "scripts"
NAMES = sorted(
    one.name.removesuffix(".lua") for one in FOLDER.iterdir() if one.name.endswith(".lua")
)
FUNCTION = re.compile(r"^local function (\w+)", re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_has_each_function_once_and_before_it_is_called(name: str) -> None:
    lines = [re.sub(r"--.*|'[^']*'", "", line) for line in script(name).text.splitlines()]
    text = "\n".join(lines)
    found = FUNCTION.findall(text)
    assert len(found) == len(set(found))
    for part in (FOLDER / "parts").iterdir():
        for function in FUNCTION.findall(part.read_text()):
            first = re.search(rf"\b{function}\(", text)
            assert not first or text[: first.start()].endswith("local function "), function


def test_an_insert_that_is_not_late_makes_no_function_of_late_ones() -> None:
    usual = script("insert").text.partition("return { 'fresh', 0 }")[0]
    late = {"thresholds", "evict", "stock_remove", "make_replayable", "gate_visit"}
    assert set(FUNCTION.findall(script("insert").text)) >= late
    assert set(FUNCTION.findall(usual)) & late == {"stock_remove"}  # comes with the bins of ages
