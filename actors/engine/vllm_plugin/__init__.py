"""vLLM general plugin ``avatar_rl``: corrects what stock vLLM does differently from the learner's
forward.

Loaded through the ``vllm.general_plugins`` entry point in every vLLM process, and by
``RolloutEngine`` directly. omni.py: positions; seconds.py: frame times; media.py and experts.py:
media and fused experts after a weight update; embeddings.py: stored embeddings in the place of a
tower's run; worker.py: log-probabilities; links.py: how weights come; routes.py: which experts
tokens took.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

#: vLLM releases whose code the corrections were written against and tested on.
CHECKED = ("0.32.",)


def register() -> bool:
    """Install the corrections in this process, once.

    Returns False, with a warning, on a vLLM release that they were not checked on.
    """
    import vllm

    if not vllm.__version__.startswith(CHECKED):
        log.warning(
            "vLLM %s: the corrections were checked on %s* only and are off; keep "
            "use_audio_in_video off and set weight_update to drain",
            vllm.__version__,
            CHECKED[0],
        )
        return False
    from avatar_rl.actors.engine.vllm_plugin import experts, media, omni, routes, seconds

    experts.install()
    omni.install()
    seconds.install()
    media.install()
    routes.install()
    return True
