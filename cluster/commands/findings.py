"""What `avatar doctor` finds, and how it shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and, where that is a problem, the remedy."""

    subject: str
    level: Level
    found: str
    remedy: str = ""


def print_findings(findings: list[Finding]) -> int:
    """The table, then each remedy in full. Exit code: 1 when something failed, else 0."""
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(title="avatar doctor", show_lines=False)
    for column in ("check", "", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for item in findings:
        table.add_row(
            item.subject, f"[{colours[item.level]}]{item.level}[/]", item.found, item.remedy
        )
    console = Console()
    console.print(table)
    failed = sum(item.level == "fail" for item in findings)
    warned = sum(item.level == "warn" for item in findings)
    console.print(f"{failed} failed, {warned} to look at, {len(findings) - failed - warned} fine")
    return int(failed > 0)


def gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
