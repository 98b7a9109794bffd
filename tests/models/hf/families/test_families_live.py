"""Every family live: classifiers with unusual settings compared with PyTorch, with gradients."""

from pathlib import Path

import pytest

from tests.fixtures.record import CASES, record
from tests.helpers.against_pytorch import check


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_classifier])
def test_activations_logits_and_gradients_match_live_pytorch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    differences = check(tmp_path, record(CASES[name], tmp_path, seed=1))
    print(name, {key: f"{value:.1e}" for key, value in sorted(differences.items())})
    assert {"embeddings", "layer_1", "layer_2", "pooled", "logits", "gradients"} == set(differences) - {
        "layer_3",
        "layer_4",
    }
