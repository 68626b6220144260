"""TAS weights against the values printed in docs/method.md 1.2."""

from __future__ import annotations

import pytest
import torch

from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.learner.objective.shaping import tas_weights


def weights(length: int, shape: str, **options: object) -> list[float]:
    return tas_weights(torch.tensor([length]), shape, dtype=torch.float64, **options)[0].tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(5, [1.3, 1.075, 1.0, 1.075, 1.3]), (2, [1.3, 1.3]), (1, [1.3]), (3, [1.3, 1.0, 1.3])],
)
def test_parabola_has_the_published_values(length: int, expected: list[float]) -> None:
    assert weights(length, "parabolic") == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("shape", "expected", "single"),
    [
        ("uniform", [1, 1, 1, 1, 1], 1.0),
        ("linear_decay", [1.3, 1.225, 1.15, 1.075, 1.0], 1.3),
        ("linear_incline", [1.0, 1.075, 1.15, 1.225, 1.3], 1.0),
        ("inverse_parabolic", [1.0, 1.225, 1.3, 1.225, 1.0], 1.0),
    ],
)
def test_ablation_shapes(shape: str, expected: list[float], single: float) -> None:
    assert weights(5, shape) == pytest.approx(expected, abs=1e-15)
    assert weights(1, shape) == pytest.approx([single])


def test_each_sequence_counts_its_own_tokens_and_padding_moves_nothing() -> None:
    found = tas_weights(torch.tensor([5, 2, 1]), width=7, dtype=torch.float64)
    assert found.shape == (3, 7)
    assert found[0].tolist() == pytest.approx([1.3, 1.075, 1.0, 1.075, 1.3, 0, 0])
    assert found[1].tolist() == pytest.approx([1.3, 1.3, 0, 0, 0, 0, 0])
    assert found[2].tolist() == pytest.approx([1.3, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_mask_and_lengths_agree(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=dtype)
    assert torch.equal(tas_weights(mask), tas_weights(torch.tensor([3, 4])))


@pytest.mark.parametrize(
    "shape", ["parabolic", "linear_decay", "linear_incline", "inverse_parabolic"]
)
def test_unit_mean_keeps_the_shape_and_averages_one(shape: str) -> None:
    plain, unit = weights(7, shape), weights(7, shape, normalize="unit_mean")
    assert sum(unit) / 7 == pytest.approx(1.0)
    ratios = [b / a for a, b in zip(plain, unit, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 7)
    assert ratios[0] < 1


def test_lambda_zero_is_uniform() -> None:
    assert weights(6, "parabolic", lam=0.0) == [1.0] * 6


@pytest.mark.parametrize(
    ("completions", "options", "error", "says"),
    [
        (torch.tensor([3, 0]), {}, DataError, r"\[1\] have no token"),
        (torch.tensor([[1, 0, 1]]), {}, DataError, "left-aligned"),
        (torch.tensor([[0, 0]]), {}, DataError, r"\[0\] have no token"),
        (torch.tensor([4]), {"width": 3}, DataError, "does not fit a width of 3"),
        (torch.ones(1, 3), {"width": 4}, DataError, "leave width out"),
        (torch.ones(1, 1, 1), {}, DataError, "lengths"),
        (torch.tensor([4]), {"shape": "square"}, ConfigError, "square"),
        (torch.tensor([4]), {"lam": -0.1}, ConfigError, "-0.1"),
        (torch.tensor([4]), {"lam": float("nan")}, ConfigError, "nan"),
        (torch.tensor([4]), {"normalize": "sum"}, ConfigError, "sum"),
    ],
)
def test_bad_input_is_a_typed_error(
    completions: torch.Tensor, options: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        tas_weights(completions, **options)  # type: ignore[arg-type]
