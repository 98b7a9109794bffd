"""Every family live: encoder-only, masked-LM, and pretraining checkpoints compared with PyTorch."""

from pathlib import Path

import pytest

from tests.fixtures.record import CASES, record
from tests.helpers.against_pytorch import check


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_classifier])
def test_activations_match_live_pytorch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    differences = check(tmp_path, record(CASES[name], tmp_path, seed=1))
    print(name, {key: f"{value:.1e}" for key, value in sorted(differences.items())})
    assert set(differences) - {"layer_2", "layer_3", "pooled"} == {"embeddings", "layer_1"}
