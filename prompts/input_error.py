"""DataError that keeps place, fault and remedy apart, so that a report can show them in columns."""

from __future__ import annotations

from avatar_rl.common.errors import DataError


class InputError(DataError):
    """What is wrong with one input (file, or file:line) and what to do. Survives pickling."""

    def __init__(self, where: object, what: str, remedy: str) -> None:
        super().__init__(str(where), what, remedy)
        self.where = str(where)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"
