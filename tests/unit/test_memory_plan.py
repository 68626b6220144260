"""The memory plan against numbers worked out by hand from the published configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatar_rl.cluster.recipe.architecture import ARCHITECTURES, Architecture
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.cluster.recipe.memory import (
    GIB,
    LearnerSetting,
    MemoryPlan,
    activation_bytes,
    learner_parts,
    optimizer_bytes,
)

DISK, MODE_OFF = "node's disk", ("learner.embeddings.mode", "off")
ROOT = Path(__file__).parents[2]
BY_NAME = {item.name: item for item in ARCHITECTURES}
OMNI, MOE = BY_NAME["Qwen2.5-Omni-7B"], BY_NAME["Qwen3-Omni-30B-A3B"]
#: 28 x (3584 x (3584 + 512 + 512 + 3584) + 3 x 3584 x 18944) + 2 x 152064 x 3584
OMNI_DECODER = 7_615_283_200
#: 48 x (2048 x (4096 + 512 + 512 + 4096) + 2048 x 128 + 128 x 3 x 2048 x 768) + 2 x 152064 x 2048
MOE_DECODER = 30_532_435_968


def test_parameters_are_those_of_the_config() -> None:
    assert OMNI.decoder == OMNI_DECODER
    assert MOE.decoder == MOE_DECODER
    # r 32 on q, o (3584 + 3584 each), k, v (3584 + 512), gate, up, down (3584 + 18944), 28 layers
    assert OMNI.adapter(32) == 28 * 32 * (2 * 7168 + 2 * 4096 + 3 * 22_528) == 80_740_352
    assert MOE.adapter(8) == 48 * 8 * (2 * 6144 + 2 * 2560)  # routed experts have none


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("model", "decoder"), [(OMNI, OMNI_DECODER), (MOE, MOE_DECODER)])
def test_zero_splits_optimiser_gradients_and_weights_in_this_order(
    model: Architecture, decoder: int, stage: int
) -> None:
    setting = LearnerSetting(ranks=8, zero_stage=stage)
    found = learner_parts(model, setting)
    assert found["optimiser"] == decoder * 12 / (8 if stage >= 1 else 1)
    assert found["gradients"] == decoder * 2 / (8 if stage >= 2 else 1)
    assert found["weights"] == (decoder + model.encoders) * 2 / (8 if stage >= 3 else 1)
    assert found["reference"] == (decoder + model.encoders) * 2 / 8  # split at every stage
    summed = LearnerSetting(ranks=8, zero_stage=stage, gradient=4)
    assert learner_parts(model, summed)["gradients"] == 2 * found["gradients"]
    offloaded = LearnerSetting(ranks=8, zero_stage=max(1, stage), offload=True)
    assert learner_parts(model, offloaded)["optimiser"] == 0
    assert optimizer_bytes(model, offloaded) == decoder * 12


def test_an_adapter_has_gradients_and_moments_of_its_own_and_no_reference() -> None:
    setting = LearnerSetting(ranks=1, reference=False, adapter_rank=32)
    found = learner_parts(OMNI, setting)
    assert found["gradients"] == 80_740_352 * 2 and found["optimiser"] == 80_740_352 * 12
    assert found["reference"] == 0 and found["weights"] == OMNI.parameters * 2


def test_a_pack_of_16k_tokens_of_the_7b_model() -> None:
    """Checkpointed: 28 layer inputs of 16,384 x 3,584 in bfloat16, and one layer's inside."""
    inputs = 28 * 16_384 * 3584 * 2
    inside = 16_384 * (2 * (4 * 3584 + 3 * 3584 + 3 * 512 + 4 * 18_944) + 2 * 4 * 3584)
    assert activation_bytes(OMNI, 16_384, checkpointing=True) == inputs + inside
    assert activation_bytes(OMNI, 16_384) == 28 * inside
    assert (inputs + inside) / GIB == pytest.approx(6.6, abs=0.1)
    found = learner_parts(OMNI, LearnerSetting(pack_tokens=16_384, checkpointing=True, workers=1))
    assert found["logits"] == 2 * 512 * 152_064 * 4 + 152_064 * 3584 * 4
    assert found["embeddings"] == 16_384 * 3584 * 2
    assert found["media workers"] == OMNI.encoders * 2 + GIB / 2


def test_ranks_that_share_a_pack_hold_a_share_of_its_activations() -> None:
    alone, shared = (
        learner_parts(
            OMNI,
            LearnerSetting(
                ranks=8, zero_stage=3, pack_tokens=16_384, sequence=n, checkpointing=True, workers=1
            ),
        )
        for n in (1, 4)
    )
    for name in ("activations", "embeddings"):
        assert shared[name] == alone[name] / 4
    for name in ("weights", "gradients", "optimiser", "reference", "logits"):
        assert shared[name] == alone[name]


def test_dry_run_doctor_and_plan_say_the_same() -> None:
    plan = MemoryPlan.of(load_recipe(ROOT / "recipes" / "qwen2_5_omni_7b.yaml", []))
    assert plan is not None
    rows = dict(plan.rows())
    assert rows["learner GPU, each of 8"].startswith(f"{plan.learner_gpu / GIB:.1f} GiB: ")
    assert "reference 2.1" in rows["learner GPU, each of 8"]
    assert f"{plan.learner_gpu / GIB:.1f}" != "0.0"
    assert rows["host, object store"].startswith("49.9 GiB")


def test_the_plan_follows_what_the_recipe_trains() -> None:
    def of(*changes: tuple[str, str]) -> MemoryPlan:
        plan = MemoryPlan.of(load_recipe(ROOT / "recipes" / "qwen2_5_omni_7b.yaml", changes))
        assert plan is not None
        return plan

    assert of().setting.workers == 1
    assert of(("learner.embeddings.mode", "off")).setting.workers == 0
    trained = of(("learner.optimizer.freeze", "[]"))
    assert trained.setting.frozen == () and trained.setting.workers == 0
    assert trained.learner_parts["gradients"] > of().learner_parts["gradients"]
    lora = of(("learner.lora", "{rank: 32}"))
    assert lora.learner_parts["reference"] == 0 and lora.checkpoint < of().checkpoint
    towers = of(("learner.lora", "{rank: 32, targets: [llm, vision]}"))
    assert towers.setting.workers == 0 and towers.setting.decoders == 1  # they make pixels
    assert towers.learner_host["media workers"] == GIB and "pixels" in dict(towers.rows())[DISK]
    assert towers.learner_parts["media workers"] == 0  # on the host alone
    off = of(("learner.lora", "{rank: 32, targets: [llm, vision]}"), MODE_OFF)
    assert off.setting.decoders == 0 and dict(off.rows())[DISK] == "none"
    assert "embeddings" in dict(of().rows())[DISK]
    without = of(("learner.objective.beta", "0"))
    assert without.learner_parts["reference"] == 0
    # ZeRO 3 loads in shares, a reference always does; the others send tensors on to the GPU.
    assert of().learner_host["weights while loading"] == OMNI.parameters * 2 / 8
    below = of(("learner.optimizer.zero_stage", "2"))
    assert below.learner_host["weights while loading"] == OMNI.parameters * 2 / 8
    below = of(("learner.optimizer.zero_stage", "2"), ("learner.objective.beta", "0"))
    assert below.learner_host["weights while loading"] == 152_064 * 3584 * 2


def test_adapters_on_towers_count_with_their_activations() -> None:
    def of(*changes: tuple[str, str]) -> MemoryPlan:
        plan = MemoryPlan.of(load_recipe(ROOT / "recipes" / "maths_vl_7b.yaml", changes))
        assert plan is not None
        return plan

    whole, decoder = of(), of(("learner.lora", "{targets: [llm]}"))
    # r 16 on 32 blocks: qkv (1280 + 3840), proj (2 x 1280), gate, up, down (1280 + 3420 each);
    # the merger's two layers (5120 + 5120, 5120 + 3584).
    blocks = 32 * (5120 + 2560 + 3 * 4700)
    tower = 16 * (blocks + 10_240 + 8704)
    assert whole.setting.trained(whole.model) - decoder.setting.trained(decoder.model) == tower
    assert decoder.learner_parts["towers' activations"] == 0
    # Four patches a token: the inputs of 32 blocks, of the merger's layers, and the pixels.
    patches = 4 * 16_384
    inputs = patches * (32 * 1280 * 2 + 1176 * 4) + 16_384 * 2 * 5120 * 2
    assert whole.learner_parts["towers' activations"] == inputs
    without = of(("learner.gradient_checkpointing", "false"))
    assert without.learner_parts["towers' activations"] > 20 * inputs
    assert whole.learner_gpu > decoder.learner_gpu
    projector = of(("learner.lora", "{targets: [projector]}"))
    assert projector.learner_parts["towers' activations"] == 16_384 * 2 * 5120 * 2
