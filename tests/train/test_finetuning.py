"""What fine-tuning says of its batches before the first of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import tiny
from xtransfer.config import ModelConfig
from xtransfer.data.task import Example
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.runtime.sharding import make_mesh
from xtransfer.train import loop
from xtransfer.train.finetuning import Finetuner

WARNING = (
    "warning: teacher: more than a quarter of each batch is padding; "
    "change teacher.batch_size or teacher.row_length to save time"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def said(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """What is printed before a training on eight examples of so many tokens, each in a row of 24."""
    monkeypatch.setattr(loop, "fit", lambda *args: None)

    def train(tokens: int, **settings: object) -> str:
        of_model = ModelConfig(checkpoint=checkpoint, max_length=24, batch_size=8, packed=False, **settings)
        model = Finetuner("teacher", of_model, ("bad", "good"), make_mesh(), eval_batch_size=8)
        text = " ".join(["film"] * (tokens - 2))
        dataset = model.dataset([Example(f"task/train/en/{i}", text, None, i % 2, "en") for i in range(8)])
        model.train(tmp_path / "teacher", OBJECTIVES["vanilla"], dataset, dataset, seed=0)
        return " ".join(capsys.readouterr().out.split())

    return train


@pytest.mark.parametrize(
    ("tokens", "steps", "share", "warned"),
    [
        (18, 600, "75%", False),
        (17, 600, "71%", True),
        (24, 600, "100%", False),
        (5, 600, "21%", True),
        (5, 30, "21%", False),
    ],
)
def test_much_padding_is_warned_of_with_the_keys_to_change(
    said: Callable[..., str], tokens: int, steps: int, share: str, warned: bool
) -> None:
    found = said(tokens, steps=steps)
    assert f"teacher: batches of 8 rows of 24 tokens, {share} of them real" in found
    assert (WARNING in found) == warned


@pytest.mark.parametrize("steps", [6, 600])
def test_parts_that_devices_cannot_share_are_padded_and_warned_of(said: Callable[..., str], steps: int) -> None:
    """Eight rows are one for each device, so two parts have sixteen, half of them empty."""
    found = said(24, steps=steps, accumulation=2)
    assert "teacher: batches of 16 rows of 24 tokens, 50% of them real" in found
    assert "change teacher.batch_size or teacher.row_length or teacher.accumulation to save time" in found
