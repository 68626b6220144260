"""What both sides of benchmarks/loop.py train on: model folders, rows with media, rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.config import DataConfig, MediaConfig, TemplateConfig
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from tests.tiny_models import END, TEMPLATE, VISION, byte_tokenizer

GROUP = 8  # completions that an update trains of a prompt
VOCABULARY = 4096
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 210),
    "gold": (220, 180, 30),
}
QUESTION = "Which colour is it?"
#: Of an image of 300 tokens: 20 by 15 of 28 pixels.
WIDTH, HEIGHT = 560, 420
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": WIDTH * HEIGHT}


@dataclass(frozen=True)
class Task:
    """A start policy, its rows in the native layout (docs/data.md), and the name of its reward."""

    name: str
    model: Path
    rows: Path
    reward: str  # import path, as a recipe names it
    prompts: int  # of a step
    tokens: int  # of a completion at most
    lr: float
    seed: int = 0
    fixed: bool = True  # whether every completion has all its tokens
    image: bool = False

    @property
    def reward_name(self) -> str:
        return self.reward.partition(":")[2]


# -- models ----------------------------------------------------------------------------------------


def word_tokenizer(named: dict[str, str]) -> Any:
    """A token a byte, the special ones, and words up to ``VOCABULARY``: every token is text."""
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer(named)
    words = [f"w{number:04d}" for number in range(VOCABULARY - len(tokenizer))]
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_text_model(folder: Path) -> Path:
    """A Qwen2 of 6.8M parameters with random weights."""
    import transformers as hf

    tokenizer = word_tokenizer({})
    config = hf.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=680,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    hf.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_image_model(folder: Path) -> Path:
    """A Qwen2.5-VL of 2M parameters with random weights."""
    import transformers as hf

    tokenizer = word_tokenizer(VISION)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION.items()}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 192,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config: Any = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    torch.manual_seed(0)
    hf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor: Any = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(size=PIXELS),
        tokenizer,
        hf.Qwen2VLVideoProcessor(size=PIXELS),
        TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


# -- rows ------------------------------------------------------------------------------------------


def write_text_rows(path: Path, count: int) -> Path:
    """Questions of 90 bytes; the answer is of no use, the reward does not look at it."""
    words = "write words with an even number only, as many as there is room for, and nothing else"
    rows = [
        {
            "id": f"text-{number:04d}",
            "question": f"{number:04d}: {words}",
            "answer": "-",
            "problem_type": "free_form",
        }
        for number in range(count)
    ]
    return write_rows(path, rows)


def write_image_rows(path: Path, count: int) -> Path:
    """Pictures of one colour under noise, each colour equally often."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        noise = rng.normal(0, 40, (HEIGHT, WIDTH, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        file = path.parent / f"{number:04d}.png"
        Image.fromarray(pixels).save(file)
        rows.append(
            {
                "id": f"image-{number:04d}",
                "question": QUESTION,
                "answer": colour,
                "problem_type": "free_form",
                "media": {"items": [{"kind": "image", "uri": str(file.resolve())}]},
            }
        )
    return write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.resolve()


# -- the start of the task with a checkable answer -------------------------------------------------

GUESSES = 0.75  # of the answers that the cold start shows, drawn from all colours
SFT_STEPS, SFT_PROMPTS, SFT_LR = 240, 4, 2e-3


def answer_text(colour: str) -> str:
    return f"<think>I see it</think><answer>{colour}</answer>{END}"


def cold_start(model: Path, rows: Path, out: Path, steps: int = SFT_STEPS) -> Path:
    """A copy of ``model`` that answers in the right format, and mostly guesses: there is something
    for RL to find out. The same start for both sides."""
    import transformers as hf

    processor: Any = hf.AutoProcessor.from_pretrained(model)
    template = TemplateConfig(min_pixels=56 * 56, max_pixels=WIDTH * HEIGHT)
    encoder = PromptEncoder(model, MediaLoader(MediaConfig(), base=Path(".")), template)
    prompts = list(PromptIndex.read((rows,), DataConfig()))
    loaded: Any = load_model(model, dtype="float32")
    policy, rng, loss = Policy(loaded).eval(), np.random.default_rng(1), 0.0
    optimizer = torch.optim.AdamW(policy.parameters(), lr=SFT_LR, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = SFT_LR * min(1.0, (step + 1) / 20) * (1 - step / steps)
        shown: list[Row] = []
        for number in rng.choice(len(prompts), SFT_PROMPTS, replace=False):
            prompt = prompts[number]
            encoded = encoder.encode(prompt, hinted=False)
            for _ in range(GROUP):
                guess = rng.random() < GUESSES
                colour = str(rng.choice(list(COLOURS))) if guess else prompt.answer
                tokens = processor.tokenizer(answer_text(colour))["input_ids"]
                shown.append(Row((prompt.id, False), encoded, np.array(tokens, dtype=np.int32)))
        batch = collate(shown)
        found = -policy(batch).logprobs.sum() / batch.mask.sum()
        found.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = found.item()
    policy.release()
    loaded.save_pretrained(out)
    processor.save_pretrained(out)
    print(f"cold start: loss {loss:.3f} per token after {steps} updates", flush=True)
    return out
