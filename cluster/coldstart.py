"""Stage 0 on the learner's own rank group; the result is a checkpoint in the cache that the RL run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.assets import Datasets, cold_start_folder
from cluster.config import RunConfig
from cluster.pool import Pool, unwrap
from cluster.specs import learner_spec

CHUNK = 10  # updates between progress reports


def cold_start(config: RunConfig, pool: Pool, base: Path, datasets: Datasets, screen: Any) -> Path:
    """Folder of the cold-started policy; trains it unless the cache has it."""
    import ray

    sft = config.cold_start
    assert sft is not None and datasets.sft is not None
    folder = cold_start_folder(config, base, datasets.sft).resolve()
    if folder.is_dir():
        return folder
    screen.phase("cold start (SFT)", f"{sft.steps} steps of {sft.batch_size} prompts")
    spec = learner_spec(config, "cold-start", base, datasets, "", cold_start=True)
    pool.wait_ready(pool.start_learner(spec, ranks=sft.ranks), "cold-start learner")
    try:
        for first in range(0, sft.steps, CHUNK):
            count = min(CHUNK, sft.steps - first)
            [report, *_] = ray.get([rank.sft.remote(first, count) for rank in pool.ranks])
            screen.progress(first + count, sft.steps, detail=f"loss {report['loss']:.3f} per token")
        ray.get([rank.export.remote(folder) for rank in pool.ranks])
    except ray.exceptions.RayTaskError as error:
        raise unwrap(error) from error
    finally:
        pool.stop_learner()
    return folder
