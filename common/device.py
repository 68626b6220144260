"""Whether this process has a GPU to work on."""

from __future__ import annotations

import sys

from avatar_rl.common.errors import ResourceError


def sees_gpu() -> bool:
    """Raises ResourceError where Ray has given this worker a GPU that torch does not see: it would
    go on without."""
    import torch

    if torch.cuda.is_available():
        return True
    ray = sys.modules.get("ray")
    if (
        ray is not None
        and ray.is_initialized()
        and ray.get_runtime_context().get_accelerator_ids().get("GPU")
    ):
        raise ResourceError(
            "Ray has given this process a GPU, but torch sees none: its environment has the CPU "
            "stack (`make setup "
            "EXTRA=gpu` installs the other), or the driver is missing; for the CPU start it with "
            "CUDA_VISIBLE_DEVICES="
        )
    return False
