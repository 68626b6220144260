"""`avatar view`: which runs are meant, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from avatar_rl.common.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8420
    media: tuple[Path, ...] = ()
    export: Path | None = None
    terminal: bool = False
    open_browser: bool = False


def view(runs: Sequence[str], asked: Asked) -> int:
    """Exit code. Raises ConfigError for a run that is not there, ResourceError for a port that is
    taken, DataError for an export into a folder that holds something."""
    found = [named(run, asked.folder) for run in runs]
    parents = {run.parent for run in found} or {asked.folder}
    if len(parents) > 1:
        raise ConfigError(
            "avatar view shows the runs of one folder: "
            + ", ".join(map(str, sorted(parents)))
            + " are several"
        )
    (parent,) = parents
    names = [run.name for run in found]
    if asked.terminal:
        from avatar_rl.cluster.view.terminal import show

        if len(names) != 1:
            raise ConfigError("avatar view --terminal takes one run: its id, or its folder")
        return show(parent / names[0])
    from avatar_rl.cluster.view.resources import Resources

    if asked.export is not None:
        from avatar_rl.cluster.view.export import export

        page = export(Resources(parent, only=names, media=asked.media), asked.export)
        print(f"open {page} in a browser; the folder can be moved, zipped and shared")
        return 0
    if not parent.is_dir():
        raise ConfigError(f"there is no folder {parent}: --folder says where the runs are")
    from avatar_rl.cluster.view.server import serve

    def opened(address: str) -> None:
        import webbrowser

        if asked.open_browser:
            webbrowser.open(address)

    serve(
        Resources(parent, media=asked.media),
        host=asked.host,
        port=asked.port,
        run=names[0] if len(names) == 1 else "",
        on_ready=opened,
    )
    return 0


def named(run: str, folder: Path) -> Path:
    """The folder of a run by its path or its id below ``folder``. Raises ConfigError."""
    from avatar_rl.cluster.checkpoints.resume import named_run
    from avatar_rl.cluster.telemetry.run_files import list_runs

    found = named_run(folder, run)
    if found is not None:
        return found.resolve()
    known = ", ".join(status.run_id for status in list_runs(folder, lambda _: None)[:5]) or "none"
    what = "is no run: it has no status.json" if Path(run).is_dir() else "does not exist"
    raise ConfigError(f"avatar view: {run} {what}; newest below {folder}: {known}")
