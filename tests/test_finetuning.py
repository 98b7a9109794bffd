"""What fine-tuning says of its batches before the first of them."""

from pathlib import Path

import pytest

from tests import tiny
from xtransfer.config import ModelConfig
from xtransfer.data.examples import Example
from xtransfer.sharding import make_mesh
from xtransfer.train import loop
from xtransfer.train.finetuning import Finetuner
from xtransfer.transfer.objectives import OBJECTIVES

WARNING = (
    "warning: teacher: more than a quarter of each batch is padding: "
    "change teacher.batch_size or teacher.row_length to waste less time"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


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
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tokens: int,
    steps: int,
    share: str,
    warned: bool,
) -> None:
    """Eight examples of so many tokens, each in a row of 24."""
    monkeypatch.setattr(loop, "fit", lambda *args: None)
    settings = ModelConfig(checkpoint=checkpoint, max_length=24, batch_size=8, steps=steps, packed=False)
    model = Finetuner("teacher", settings, ("bad", "good"), make_mesh(), eval_batch_size=8)
    text = " ".join(["film"] * (tokens - 2))
    dataset = model.dataset([Example(f"task/train/en/{i}", text, None, i % 2, "en") for i in range(8)])
    model.train(tmp_path / "teacher", OBJECTIVES["vanilla"], dataset, dataset, seed=0)
    said = " ".join(capsys.readouterr().out.split())
    assert f"teacher: batches of 8 rows of 24 tokens, {share} of them real" in said
    assert (WARNING in said) == warned
