"""A dataset repository of a hub at one commit: what it holds, and what a failing hub means."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # type: ignore[attr-defined]
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from avatar_rl.common.errors import DataError

TIMEOUT_S = 30.0  # for the hub's first answer
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class HubFile:
    """A file of a snapshot. ``sha256`` is of its content where it is stored apart (LFS); else
    ``git_id`` is the sha1 that git gives it."""

    path: str
    size: int  # bytes
    git_id: str
    sha256: str | None = None

    @property
    def checksum(self) -> str:
        return self.sha256 or self.git_id


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repo: str  # owner/name
    revision: str  # as it was asked for
    commit: str
    endpoint: str
    files: tuple[HubFile, ...]


def endpoint() -> str:
    """The hub that is asked: HF_ENDPOINT, or the library's own."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def open_snapshot(repo: str, revision: str) -> Snapshot:
    """The files of ``repo`` at ``revision``, a branch, tag or commit. Raises DataError."""
    hub = endpoint()
    api = HfApi(endpoint=hub, token=get_token() or False)
    with named_errors(repo, revision):
        info = api.repo_info(repo, revision=revision, repo_type="dataset", timeout=TIMEOUT_S)
        assert info.sha is not None, "the hub names the commit of every revision"
        tree = api.list_repo_tree(repo, recursive=True, revision=info.sha, repo_type="dataset")
        files = tuple(
            HubFile(one.path, one.lfs.size if one.lfs else one.size, one.blob_id, _sha256(one))
            for one in tree
            if isinstance(one, RepoFile)
        )
    return Snapshot(repo, revision, info.sha, hub, files)


def _sha256(file: RepoFile) -> str | None:
    return file.lfs.sha256 if file.lfs is not None else None


@contextmanager
def named_errors(repo: str, revision: str) -> Iterator[None]:
    """What goes wrong between here and the hub, as a DataError that says what to do. Neither the
    token nor a signed address gets into a message."""
    what = f"dataset {repo} at {endpoint()}"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise DataError(
            f"{what}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{what} has no revision {revision!r}: name a branch, a tag or a whole commit"
        ) from error
    except GatedRepoError as error:
        raise DataError(
            f"{what} is gated: accept its terms on its page, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{what} is not there, or not for everybody: check HF_ENDPOINT, and set HF_TOKEN if it "
            "is private"
        ) from error
    except HFValidationError as error:
        raise DataError(f"{repo!r} is no dataset of a hub: give OWNER/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "set HF_TOKEN" if status in (401, 403) else "try again later"
        raise DataError(
            f"{what}: the hub answers {status}; what is here stays, {remedy}"
        ) from error
    except HTTPError as error:
        raise DataError(
            f"{what} cannot be reached ({type(error).__name__}): see whether this machine has a "
            "network, or set HF_ENDPOINT to a mirror; what is here stays"
        ) from error
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"{what}: no space is left; free some, what is here stays") from error
        if error.errno is None:  # the library's own: the hub sent less than it said
            raise DataError(
                f"{what}: the hub sent less than it said; what is here stays, fetch again"
            ) from error
        raise DataError(f"{what}: {error.strerror} ({error.filename})") from error


def check_space(folder: Path, size: int, what: str) -> None:
    """Raises DataError where ``size`` more bytes do not fit beside ``folder``."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise DataError(
            f"{what} takes {size / 1e9:,.1f} GB and {place} has {free / 1e9:,.1f} GB free: free "
            "some, or name another --out"
        )
