"""Random checkpoints of published sizes, made on the device: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni


class DecoderSize(NamedTuple):
    """A language model as its config.json has it."""

    hidden: int
    layers: int
    heads: int
    pairs: int  # of keys and values
    mlp: int
    vocabulary: int
    head: int = 128  # width of a head

    @property
    def parameters(self) -> float:
        """Without biases and norms."""
        attention = self.hidden * self.head * 2 * (self.heads + self.pairs)
        layers = self.layers * (attention + 3 * self.hidden * self.mlp)
        return float(layers + 2 * self.vocabulary * self.hidden)

    @property
    def sections(self) -> list[int]:
        """``mrope_section``: thirds of half a head, as published."""
        half = self.head // 2
        return [half // 4, half * 3 // 8, half * 3 // 8]


OMNI_3B = DecoderSize(2048, 36, 16, 2, 11_008, 151_936)
OMNI_7B = DecoderSize(3584, 28, 28, 4, 18_944, 152_064)
TINY = DecoderSize(64, 2, 2, 1, 128, 4096, head=32)
#: The published vision tower of Qwen2.5-VL and Qwen2.5-Omni.
TOWER: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TINY_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}
#: Published audio tower, but for the mel bins, which are the tiny processor's.
EARS: dict[str, Any] = {
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
}


TINY_EARS: dict[str, Any] = {
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "d_model": 64,
}


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Models that are made inside have their weights there, in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def text_model(size: DecoderSize, device: torch.device) -> Any:
    """A Qwen2 of random weights on ``device``, in evaluation mode."""
    import transformers as hf

    config = hf.Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.pairs,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        use_cache=False,
    )
    torch.manual_seed(0)
    with made_on(device, dtype_on(device)):
        model = hf.Qwen2ForCausalLM(config)
    return model.eval()


def random_omni(
    folder: Path,
    size: DecoderSize | None,
    device: torch.device,
    *,
    tower: dict[str, Any] = TOWER,
    ears: dict[str, Any] = EARS,
) -> Path:
    """A Qwen2.5-Omni in its published layout, the tiny model's tokenizer and processor around a
    decoder of ``size`` and towers of published sizes; None: the tiny model itself."""
    build_tiny_omni(folder)
    if size is None:
        return folder
    import transformers as hf
    from safetensors.torch import save_file

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    thinker = config["thinker_config"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": size.sections}
    thinker["text_config"] |= {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.pairs,
        "max_position_embeddings": 32_768,
        "rope_parameters": rope,
    }
    thinker["text_config"].pop("layer_types", None)  # of the tiny model's layers
    thinker["vision_config"] |= tower | {"out_hidden_size": size.hidden}
    thinker["audio_config"] |= ears | {"output_dim": size.hidden}
    config["dtype"] = str(dtype_on(device)).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = hf.AutoConfig.from_pretrained(folder).thinker_config
    with made_on(device, dtype_on(device)):
        model = hf.Qwen2_5OmniThinkerForConditionalGeneration(made)
    weights = {f"thinker.{name}": value.cpu() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
