"""Run folders for the tests of `avatar view`: as a run writes them, of any size, with clips that
were made here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WORDS = [
    "the",
    "red",
    "disc",
    "moves",
    "left",
    "while",
    "two",
    "low",
    "beeps",
    "sound",
    "so",
    "the",
    "answer",
    "is",
]
#: Text that a careless page or terminal would carry out.
HOSTILE = (
    "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"
    "</pre><b>bold</b> [red]markup[/red] \x1b[2J\x1b]0;title\x07 \u202eturned\u202c {{ 7*7 }} 🎬 é"
)


def video_file(
    path: Path, *, seconds: float = 4.0, codec: str = "libx264", sound: str | None = "aac"
) -> Path:
    """A moving square of 160 x 96, 10 frames per second, and a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        track = container.add_stream(sound, rate=16000) if sound else None
        for i in range(round(seconds * 10)):
            picture = np.full((96, 160, 3), 24, np.uint8)
            left = round(i / (seconds * 10) * 120)
            picture[30:66, left : left + 36] = (230, 70, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            tone = np.sin(np.arange(round(seconds * 16000)) * 440 * 2 * math.pi / 16000)
            frame = av.AudioFrame.from_ndarray(
                (tone * 0.2).astype(np.float32)[None], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
            container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


def sample(
    step: int, group: int, member: int, *, media: Sequence[object] = (), tokens: int = 24
) -> dict[str, object]:
    """A row as learner/samples.py makes it; 4 fresh ones and 4 replays to a group."""
    rng = np.random.default_rng([step, group, member])
    words = [str(word) + " " for word in rng.choice(WORDS, tokens)]
    replayed, dead = member >= 4, group % 5 == 4
    reward = 0.25 if dead and not replayed else float(rng.choice([0.0, 0.25, 1.25]))
    return {
        "prompt_id": f"train-{group:05d}",
        "category": ["colour", "beeps", "order"][group % 3],
        "needs": ["video", "audio"],
        "type": "multiple_choice",
        "question": f"Which way does shape {group} move?",
        "answer": "A",
        "options": ["A. left", "B. right"],
        "media": list(media),
        "hint": "Look where it is at the end.",
        "id": f"{group:08d}.{member}",
        "group": f"{step:04d}{group:04d}",
        "replayed": replayed,
        "text": "".join(words),
        "reward": reward,
        "accuracy": float(reward > 1),
        "components": {
            "format": 1.0,
            "accuracy": float(reward > 1),
            "judge": None if group % 7 == 6 else 0.5,
        },
        "details": {"judge/visual_id_score": 0.75, "judge/audio_grounding_score": 0.25},
        "imputed": False,
        "hinted": group % 4 == 3,
        "version": max(0, step - 1 - 3 * replayed),
        "versions": [[max(0, step - 1 - 3 * replayed), tokens]],
        "age": 1 + 3 * replayed,
        "tier": ["easy", "medium", "hard"][group % 3],
        "baseline": 0.4,
        "advantage": 0.0 if dead and not replayed else round(reward - 0.4, 4),
        "dead_before": dead,
        "dead_after": False,
        "finish_reason": "length" if member == 7 else "stop",
        "temperature": 1.0,
        "tokens": tokens,
        "token_ends": np.cumsum([len(word) for word in words]).tolist(),
        "logprobs": np.round(-rng.exponential(1, tokens), 4).tolist(),
        "log_ratio": np.round(rng.normal(0, 0.2, tokens), 4).tolist(),
        "entropy": np.round(rng.exponential(0.8, tokens), 4).tolist(),
        "weight": np.round(1 + 0.3 * np.linspace(-1, 1, tokens) ** 2, 4).tolist(),
    }


def make_run(
    parent: Path,
    name: str = "demo-1",
    *,
    steps: int = 4,
    groups: int = 5,
    media: Sequence[object] = (),
    state: str = "finished",
    tokens: int = 24,
) -> Path:
    """A run of ``steps`` saved steps with ``groups`` groups of 8 each, and an evaluation."""
    run = parent / name
    (run / "samples").mkdir(parents=True)
    now = time.time()
    status = {
        "run_id": name,
        "state": state,
        "step": steps,
        "total_steps": steps,
        "phase": "writing the report",  # its last one
        "started": now - 90,
        "updated": now,
        "host": "elsewhere",
        "pid": 1,
        "accuracy_before": 0.4,
        "accuracy_now": 0.7,
        "reward": 0.6,
    }
    (run / "status.json").write_text(json.dumps(status))
    (run / "config.yaml").write_text(
        f"name: {name}\nseed: 0\nlearner:\n  optimizer: {{lr: 1.0e-4}}\n"
    )
    write_lines(run / "metrics.jsonl", [metrics(step, steps) for step in range(steps + 1)])
    events = [
        {"timestamp": now, "step": 1, "kind": "prompt quarantined", "message": "train-00002: gone"},
        {"timestamp": now, "step": 2, "kind": "warning", "message": "all is well"},
    ]
    write_lines(run / "events.jsonl", events)
    for step in range(1, steps + 1):
        rows = [
            sample(step, group, member, media=media, tokens=tokens)
            for group in range(groups)
            for member in range(8)
        ]
        write_lines(run / "samples" / f"step_{step:06d}.jsonl", rows)
    kept = (
        "prompt_id",
        "category",
        "question",
        "answer",
        "text",
        "accuracy",
        "components",
        "media",
    )
    answers = [sample(0, group, 0, media=media) for group in range(3)]
    rows = [{name: row[name] for name in kept} for row in answers]
    write_lines(run / "samples" / "eval_000000.jsonl", rows)
    return run


def metrics(step: int, steps: int) -> dict[str, object]:
    part = step / max(1, steps)
    return {
        "step": step,
        "timestamp": time.time(),
        "eval/accuracy": 0.4 + 0.3 * part,
        "reward/mean": 0.2 + part,
        "groups/dead_before": 0.6 - 0.3 * part,
        "groups/dead_after": 0.3 - 0.2 * part,
        "tiers/easy": 4 * step,
        "tiers/medium": 3 * step,
        "tiers/hard": 8 * step,
        "entropy/fresh": 1.2 - part,
    }


def write_lines(file: Path, rows: Sequence[object]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
