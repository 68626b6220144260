"""A pack against copied prompts: forward and backward of the same completions over the same
precomputed media embeddings, both with recomputed activations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.batch.packing import Size, pack
from avatar_rl.learner.model.load import DTYPES, load_model, recompute_activations
from avatar_rl.learner.model.policy import Policy
from avatar_rl.prompts.encoding.embeddings import MediaEmbeddings
from avatar_rl.prompts.encoding.template import EncodedPrompt

WIDTH = 192
VOCABULARY = 4096
IMAGE, VIDEO, START, END = VOCABULARY - 4, VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1
PROMPT, COMPLETION = 1000, 100  # tokens; the video is nine tenths of the prompt
BUDGET = 16_384  # tokens of a pack


class ModelSize(NamedTuple):
    """Of the language model of ``build_vision_model``."""

    width: int = WIDTH
    layers: int = 4
    heads: int = 6
    pairs: int = 2  # of keys and values
    mlp: int = 512
    vocabulary: int = VOCABULARY
    sections: tuple[int, int, int] = (4, 6, 6)  # of half a head


SMALL = ModelSize()


class Shape(NamedTuple):
    """Completions by prompt, of one group."""

    name: str
    completions: tuple[int, ...]


GRPO = Shape("grpo", (8,))  # 8 fresh ones of one prompt
AVATAR = Shape("avatar", (4, 1, 1, 1, 1))  # 4 fresh ones, 4 replays of other prompts


def build_vision_model(
    folder: Path, size: ModelSize = SMALL, *, device: str = "cpu", dtype: str = "float32"
) -> Path:
    """A Qwen2.5-VL of 2M parameters or another size, its vision tower a token one."""
    import transformers as hf

    text = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.pairs,
        "max_position_embeddings": 65_536,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": list(size.sections),
        },
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": size.width,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=DTYPES[dtype])
    model.save_pretrained(folder)
    return folder


def make_rows(shape: Shape, *, scale: float = 1.0, width: int = WIDTH) -> list[Row]:
    """The completions of one group; their lengths differ by a third either way. ``scale`` shortens
    all of them."""
    rng = np.random.default_rng(0)
    length, mean = round(PROMPT * scale), round(COMPLETION * scale)
    rows = []
    for number, count in enumerate(shape.completions):
        ids = torch.from_numpy(rng.integers(2, IMAGE, length))
        places = torch.arange(length // 20, length // 20 + length * 9 // 10)
        ids[places] = VIDEO
        positions = torch.arange(length).expand(3, -1)
        prompt = EncodedPrompt(ids, positions, length)
        values = torch.from_numpy(rng.normal(0, 0.02, (len(places), width)).astype(np.float32))
        for _ in range(count):
            tokens = rng.integers(2, IMAGE, rng.integers(mean * 2 // 3, mean * 4 // 3 + 1))
            media = MediaEmbeddings(places, values)
            rows.append(Row((str(number), False), prompt, tokens.astype(np.int32), media=media))
    return rows


class Side:
    """One way to compute the rows: ``run`` adds gradients and returns the loss."""

    model: nn.Module

    def run(self) -> float:
        raise NotImplementedError

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss and a copy of the gradients, which are cleared."""
        loss = self.run()
        found = {
            name.replace("model.model.", "model."): p.grad.clone()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        self.model.zero_grad(set_to_none=True)
        return loss, found

    def seconds(self) -> float:
        start = time.perf_counter()
        self.run()
        spent = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return spent


def weights_of(row: Row) -> Tensor:
    """A factor per token of the loss, as of an advantage over a length."""
    sign = 1.0 if int(row.token_ids[0]) % 2 else -0.7
    return torch.full((len(row.token_ids),), sign / len(row.token_ids))


class PackedSide(Side):
    """The learner's policy over packs within the default budget."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Row],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        budget: int = BUDGET,
        recompute: bool = True,
    ) -> None:
        model = load_model(folder, dtype=dtype)
        if recompute:
            recompute_activations(model)
        freeze_tower(model)
        self.model, self.device = Policy(model).to(device), torch.device(device)
        sizes = [Size(row.key, len(row.prompt.input_ids), len(row.token_ids)) for row in rows]
        self.packs = [[rows[i] for i in indices] for indices in pack(sizes, budget)]

    @property
    def positions(self) -> int:
        return sum(len(collate(rows).input_ids) for rows in self.packs)

    def run(self) -> float:
        total = 0.0
        for rows in self.packs:
            batch = collate(rows).to(self.device)
            logprobs = self.model(batch).logprobs
            weights = torch.nn.utils.rnn.pad_sequence([weights_of(row) for row in rows], True)
            loss = (weights.to(self.device) * logprobs).sum()
            loss.backward()
            total += float(loss.detach())
        return total


class CopiedSide(Side):
    """transformers' own forward over rows that each carry their prompt, padded to the longest of a
    micro-batch of ``count``."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Row],
        count: int,
        *,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        import transformers as hf

        model: Any = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=DTYPES[dtype]
        ).to(device)
        self.device = torch.device(device)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model: Any = model.train()
        freeze_tower(model)
        order = sorted(rows, key=lambda row: len(row.token_ids))  # least padding
        self.batches = [order[i : i + count] for i in range(0, len(order), count)]

    @property
    def positions(self) -> int:
        return sum(
            len(rows) * max(len(row.prompt.input_ids) + len(row.token_ids) for row in rows)
            for rows in self.batches
        )

    def run(self) -> float:
        return sum(self._run(rows) for rows in self.batches)

    def _run(self, rows: Sequence[Row]) -> float:
        pad: Callable[..., Tensor] = torch.nn.utils.rnn.pad_sequence
        tokens = [torch.from_numpy(row.token_ids).long().to(self.device) for row in rows]
        whole = [
            torch.cat([row.prompt.input_ids.to(self.device), t])
            for row, t in zip(rows, tokens, strict=True)
        ]
        ids = pad(whole, batch_first=True)
        words = self.model.get_input_embeddings()(ids)
        embedded = torch.stack(
            [
                one.index_copy(0, row.media.places.to(self.device), row.media.values.to(one))
                for one, row in zip(words, rows, strict=True)
                if row.media is not None
            ]
        )
        positions = torch.arange(ids.shape[1], device=self.device).expand(3, len(rows), -1)
        longest = max(len(t) for t in tokens)  # all prompts have one length
        logits = self.model(
            inputs_embeds=embedded,
            attention_mask=pad([torch.ones_like(one) for one in whole], batch_first=True),
            position_ids=positions,
            logits_to_keep=longest + 1,
            use_cache=False,
        ).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1)
        own = logprobs.gather(2, pad(tokens, batch_first=True)[..., None])[..., 0]
        factors = pad([weights_of(row) for row in rows], batch_first=True).to(self.device)
        loss = (factors * own).sum()
        loss.backward()
        return float(loss.detach())


def freeze_tower(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
