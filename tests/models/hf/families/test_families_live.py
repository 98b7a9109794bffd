"""Every family is the same function as its original, computed now: classifiers of unusual settings, with gradients."""

from pathlib import Path

import pytest

from tests.fixtures.record import CASES, record
from tests.helpers.against_pytorch import check


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_classifier])
def test_live_activations_logits_and_gradients_of_pytorch_are_met(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = check(tmp_path, record(CASES[name], tmp_path, seed=1))
    print(name, {key: f"{value:.1e}" for key, value in sorted(found.items())})
    assert {"embeddings", "layer_1", "layer_2", "pooled", "logits", "gradients"} == set(found)
