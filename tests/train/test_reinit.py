"""Last layers that start from random numbers."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer.config import ModelConfig
from xtransfer.errors import UserError
from xtransfer.runtime.sharding import make_mesh, path_name
from xtransfer.train.finetuning import Finetuner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of three layers, 64 wide, whose initializer range is 0.5."""
    directory = tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny", hidden=64, layers=3)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))
    return directory


def finetuner(checkpoint: Path, mesh: tuple[int, int, int] | None = None, **settings: Any) -> Finetuner:
    config = ModelConfig(checkpoint=str(checkpoint), max_length=12, **settings)
    return Finetuner("student", config, ("bad", "good"), make_mesh(mesh), eval_batch_size=8)


def params(checkpoint: Path, seed: int = 0, mesh: tuple[int, int, int] | None = None, **settings: Any) -> dict:
    model = finetuner(checkpoint, mesh, **settings)
    leaves = jax.tree_util.tree_leaves_with_path(model.fresh_params(seed))
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def test_only_the_last_layers_are_drawn_with_the_checkpoints_range(checkpoint: Path) -> None:
    before, after = params(checkpoint), params(checkpoint, reinit_layers=2)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    kernels = {
        name
        for name in before
        if name.endswith(".kernel") and name.startswith(("encoder.layers.1", "encoder.layers.2"))
    }
    assert kernels and kernels <= changed and all(".layers.0." not in name for name in changed)
    assert all(name.startswith("encoder.layers.") for name in changed)
    values = np.concatenate([after[name].ravel() for name in sorted(kernels)])
    assert values.size == 2 * 8 * 64 * 64  # four projections of 64 × 64 and two of 64 × 128, in two layers
    # The standard error of a standard deviation of 0.5 over n numbers is 0.5 / sqrt(2 n): 0.0014. Allow four of them.
    assert abs(values.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * values.size)
    assert abs(values.mean()) < 4 * 0.5 / np.sqrt(values.size)
    for name in after:
        if name.startswith("encoder.layers.2.") and name not in kernels:
            np.testing.assert_array_equal(after[name], 1.0 if name.endswith("scale") else 0.0)


def test_the_numbers_depend_on_the_seed_and_not_on_the_mesh(checkpoint: Path) -> None:
    name = "encoder.layers.2.output.kernel"
    first, second = (params(checkpoint, seed, reinit_layers=1)[name] for seed in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, params(checkpoint, mesh=(2, 2, 2), reinit_layers=1)[name])
    assert not np.array_equal(first, params(checkpoint, reinit_layers=1)["encoder.layers.2.attention.query.kernel"])


def test_impossible_settings_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"student\.reinit_layers is 4, but .* has only 3 layers"):
        params(checkpoint, reinit_layers=4)
    with pytest.raises(
        UserError, match=r"student\.frozen: '\^encoder' matches encoder\.layers\.2\..*would stay random"
    ):
        params(checkpoint, reinit_layers=1, frozen=("^encoder",))
    params(checkpoint, reinit_layers=1, frozen=(r"\.layers\.[01]\.", "embeddings"))


def test_a_wrong_range_in_the_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = tiny.checkpoint(tmp_path / "tiny")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"initializer_range": -1.0}))
    with pytest.raises(UserError, match=r"config\.json: initializer_range is -1\.0, expected a positive number"):
        finetuner(copy, reinit_layers=1)
