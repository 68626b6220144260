"""What a finished run says on the terminal."""

from __future__ import annotations

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.training.run import RunResult


def print_summary(config: RunConfig, result: RunResult) -> None:
    """Headline first; then where to look."""
    print()
    if result.before is not None and result.after is not None:
        gain = result.after.accuracy - result.before.accuracy
        print(
            f"held-out accuracy {result.before.accuracy:.3f} -> {result.after.accuracy:.3f} "
            f"({gain:+.3f}) "
            f"on {result.after.prompts} prompts, {result.completions} completions generated, "
            f"{result.seconds:.0f} s"
        )
        for name, after in result.after.by_category.items():
            before = result.before.by_category.get(name, float("nan"))
            print(f"  {name:<20} {before:.2f} -> {after:.2f}")
    print(f"run folder   {result.run}")
    if config.output.report:
        print(f"report       {result.run / 'report.html'}")
    if config.output.export:
        print(f"checkpoint   {result.run / 'checkpoint'}")
