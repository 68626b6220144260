"""What every test process needs before torch is imported, and how test files are handed to the
workers."""

import gc
import logging
import os
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

# vLLM on a CPU insists on one thread count in all threads, and OpenMP reads it once; runs set it
# per worker too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray runs actors at nice 15: beside a training run of the other worker of `make test`, which is not
# nice, they would stand still for minutes. Runs of ours set it too.
os.environ.setdefault("RAY_worker_niceness", "0")
gc.disable()  # while test files are imported (prompts.heap.no_collections)

#: Files that take longest, in that order: begun first, so that both workers of `make test` end at
#: about the same time.
LONG = (
    "test_benchmarks",
    "test_survival",
    "test_run",
    "test_curriculum_run",
    "test_cluster",
    "test_scaling",
    "test_rollout_actor",
    "test_template",
    "test_tiny_model",
    "test_validate",
    "test_left_out",
    "test_attention",
    "test_batch",
    "test_schedule",
    "test_synthetic",
    "test_public_sets",
    "test_datasets",
    "test_keys",
    "test_report",
    "test_rewards_judge",
    "test_hub",
    "test_supervisor",
    "test_deploy",
    "test_cli_commands",
)
#: Files for one worker: transformers and half of torch are imported once, and the tiny model is
#: built once.
TOGETHER = (
    "test_template.py",
    "test_tiny_model.py",
    "test_ready_start.py",
    "test_validate.py",
    "test_left_out.py",
    "test_attention.py",
    "test_batch.py",
    "test_schedule.py",
)


#: Files whose tests share nothing that takes long to make: each goes to whichever worker is free.
APART = ("test_benchmarks.py",)


class Scheduling(LoadFileScheduling):
    """A whole file goes to one worker, those of ``TOGETHER`` to the same one; a test of a file of
    ``APART`` goes by itself."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        if scope.endswith(TOGETHER):
            return "together"
        return nodeid if scope.endswith(APART) else scope


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """Used whatever `--dist` says."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--no-loadscope-reorder` xdist hands files out in this order."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish() -> None:
    # pytest hangs a handler on each logger that keeps its records to itself, six times a test.
    # torch has 44 of them, which say nothing unless TORCH_LOGS is set.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.freeze()  # what was imported stays: no collection need look at it
    gc.enable()
    gc.set_threshold(5000, 20, 50)  # a seventh of the collections: 5 % less of the time


@pytest.fixture(scope="session")
def tiny_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Omni of the demo; not to be changed."""
    from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni

    return build_tiny_omni(tmp_path_factory.mktemp("tiny") / "model")
