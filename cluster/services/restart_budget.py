"""How often a kind of process may die between two signs of progress."""

from __future__ import annotations

from collections.abc import Callable

from avatar_rl.common.errors import ResourceError

Report = Callable[[str, str], None]  # kind, message


class RestartBudget:
    """Deaths of one kind of process allowed between two signs of progress."""

    def __init__(self, limit: int, what: str) -> None:
        self.limit, self.what = limit, what
        self.spent = self.total = 0

    def spend(self, reason: str) -> None:
        """Raises ResourceError when there were too many."""
        self.spent += 1
        self.total += 1
        if self.spent > self.limit:
            raise ResourceError(
                f"{self.what} died {self.spent} times without a finished step, last: {reason}; "
                "see the logs folder of "
                "the run, or raise supervision.restarts"
            )

    def progress(self) -> None:
        self.spent = 0
