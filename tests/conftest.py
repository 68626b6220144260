"""What every test process needs before torch is imported, and the order in which files are handed to the workers."""

import os

import pytest

# vLLM on a CPU insists on one thread count in all threads, and OpenMP reads it once; runs set it per worker too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

#: Files that take longest, in that order: begun first, so that both workers of `make test` end at about the same time.
LONG = ("test_survival", "test_run", "test_curriculum_run", "test_cluster", "test_scaling", "test_rollout_actor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files move; with `--no-loadscope-reorder` xdist hands them out in this order."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
