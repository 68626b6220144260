"""What a learner rank's host holds while it loads -> build/bench/loading.json; run with ``make
bench NAME=loading``, about a minute.

``host_share_ratio``: anonymous memory that a rank gains at most while it loads a checkpoint of more
than 1 GB under ZeRO 3, over its share of the weights. The same with an adapter, and for a reference
policy. ``whole_host_ratio``: likewise under ZeRO 0 to 2, where every rank needs the whole model.
Two ranks; the worse one counts. docs/benchmarks.md says how to read it."""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from avatar_rl.common.process import trim_heap
from avatar_rl.common.types import JsonObject
from avatar_rl.common.weight_files import WeightFiles
from avatar_rl.learner.adapter.lora import Adapter
from avatar_rl.learner.config import OptimizerConfig
from avatar_rl.learner.engine import FrozenEngine, TrainEngine, deepspeed_config
from avatar_rl.learner.lora_config import LoraConfig
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.learner.model.sharded_load import load_in_shares
from benchmarks.harness import Figures, parser
from tests.ranks import rank_main, rank_results, run_ranks

RANKS = 2
LAYERS, SMOKE_LAYERS = 16, 2
LOOK_S = 0.005


def build(folder: Path, layers: int, width: int = 1024) -> int:
    """A Qwen2 of random weights, 67 MB a layer of the usual width; returns its bytes."""
    import transformers as hf

    config = hf.Qwen2Config(
        vocab_size=4 * width,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    hf.Qwen2ForCausalLM(config).save_pretrained(folder)
    return sum(file.stat().st_size for file in WeightFiles.find(folder).files)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


class Peak:
    """The most anonymous memory inside a block, beyond what was there before."""

    def __enter__(self) -> Peak:
        self._before = self._most = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def gained(self) -> int:
        return max(self._most, anonymous_bytes()) - self._before

    def _look(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._most = max(self._most, anonymous_bytes())


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What a rank gains while it loads in shares, then where it loads the whole model first."""
    import deepspeed

    optimizer = OptimizerConfig(zero_stage=3, dtype="float32")
    config = deepspeed_config(optimizer, ranks, "float32")
    found = {}
    # What is imported on the way is no weight.
    load_in_shares(folder / "tiny", dtype="float32", deepspeed_config=config)
    start = time.perf_counter()
    with Peak() as peak:
        model = load_in_shares(folder / "model", dtype="float32", deepspeed_config=config)
    found["shares"], found["shares_s"] = peak.gained, time.perf_counter() - start
    del model
    start = time.perf_counter()
    with Peak() as peak:
        whole = load_model(folder / "model")
        deepspeed.zero.Init(module=whole, config_dict_or_path=config)
    found["whole"], found["whole_s"] = peak.gained, time.perf_counter() - start
    del whole
    found |= further(folder, ranks, config)
    return {"loading": found}


def further(folder: Path, ranks: int, config: JsonObject) -> dict[str, int]:
    """An adapter and its engine, a reference's engine, and a whole model tensor by tensor: what a
    rank gains while it makes them."""
    optimizer = OptimizerConfig(zero_stage=3, dtype="float32")

    def adapted(path: Path) -> TrainEngine:
        model = load_in_shares(path, dtype="float32", deepspeed_config=config)
        adapter = Adapter.attach(model, LoraConfig(rank=8), seed=0)
        policy = Policy(model)
        return TrainEngine(policy, optimizer, world_size=ranks, dtype="float32", adapter=adapter)

    def frozen(path: Path) -> FrozenEngine:
        model = load_in_shares(path, dtype="float32", deepspeed_config=config)
        return FrozenEngine(Policy(model), optimizer, world_size=ranks, dtype="float32")

    def placed(path: Path) -> nn.Module:
        return load_model(path, device=torch.device("cpu"))

    makers: dict[str, Callable[[Path], object]] = {
        "adapter": adapted,
        "reference": frozen,
        "placed": placed,
    }
    found = {}
    for name, make in makers.items():
        made: object = make(folder / "tiny")  # imports, and DeepSpeed's own
        del made
        gc.collect()
        trim_heap()
        with Peak() as peak:
            made = make(folder / "model")
        found[name] = peak.gained
        del made
        gc.collect()
        trim_heap()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    disable_progress_bar()
    figures = Figures("loading", options.out)
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = Path(name)
        size = build(folder / "model", SMOKE_LAYERS if options.smoke else LAYERS)
        build(folder / "tiny", 1, width=256)
        run_ranks("benchmarks.loading", folder, RANKS)
        found = [rank_results(folder, "loading", RANKS, rank) for rank in range(RANKS)]
    figures.add(
        {
            "checkpoint_gb": size / 1e9,
            "host_share_ratio": max(one["shares"] for one in found) / (size / RANKS),
            "host_share_ratio_lora": max(one["adapter"] for one in found) / (size / RANKS),
            "host_share_ratio_reference": max(one["reference"] for one in found) / (size / RANKS),
            "whole_host_ratio": max(one["placed"] for one in found) / size,
            "whole_load_ratio": max(one["whole"] for one in found) / (size / RANKS),
            "load_in_shares_s": max(one["shares_s"] for one in found),
            "load_whole_s": max(one["whole_s"] for one in found),
        }
    )
    figures.write()


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[2].isdigit():  # a rank, started by ``run_ranks``
        rank_main(work)
    else:
        main()
