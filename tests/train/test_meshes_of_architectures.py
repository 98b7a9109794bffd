"""A training step of every architecture on 2×2×2 devices: the same loss and gradient as on one device."""

from typing import Any

import pytest

from tests.train.test_meshes import ONE_DEVICE, SIZES, assert_same, step
from xtransfer.models.architectures import ARCHITECTURES

SETTINGS: dict[str, dict[str, Any]] = {
    "modernbert": {"layer_types": ("sliding_attention",), "window": 4},
    "deberta": {"buckets": 4, "shares_projections": True, "normalizes_distances": True, "convolution_size": 3},
    "eurobert": {"kv_heads": 1},
    "gte": {"rope_divisor": 2.0},
    "xlm_roberta_xl": {},
}
WITH_REMAT = ("modernbert", "deberta")  # whose layers read more than arrays


def test_every_architecture_is_tested() -> None:
    assert set(SETTINGS) == set(ARCHITECTURES) - {"bert"}  # which tests/train/test_meshes.py has


@pytest.mark.parametrize("name", SETTINGS)
def test_training_step_in_microbatches_matches_one_device(name: str) -> None:
    """Dropout also matches. Some layers are computed again in the backward pass."""
    config = ARCHITECTURES[name].config_class(vocab_size=61, **SIZES, **SETTINGS[name], architecture=name)
    expected = step(ONE_DEVICE, architecture=config)
    actual = step((2, 2, 2), architecture=config, accumulation=2, remat=name in WITH_REMAT)
    assert_same(actual, expected)
