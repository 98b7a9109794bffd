"""Messages of fine-tuning about its batches, printed before the first step."""

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
def train_output(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Return a function that trains on eight examples of a given length, in rows of 24, and returns the output."""
    monkeypatch.setattr(loop, "fit", lambda *args: None)

    def train(tokens: int, **settings: object) -> str:
        config = ModelConfig(checkpoint=checkpoint, max_length=24, batch_size=8, packed=False, **settings)
        model = Finetuner("teacher", config, ("bad", "good"), make_mesh(), eval_batch_size=8)
        text = " ".join(["film"] * (tokens - 2))
        dataset = model.dataset([Example(f"task/train/en/{i}", text, None, i % 2, "en") for i in range(8)])
        model.train(tmp_path / "teacher", OBJECTIVES["vanilla"], dataset, {"en": dataset}, 0, lambda logits, labels: {})
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
def test_much_padding_warns_with_the_keys_to_change(
    train_output: Callable[..., str], tokens: int, steps: int, share: str, warned: bool
) -> None:
    output = train_output(tokens, steps=steps)
    assert f"teacher: batches of 8 rows of 24 tokens, {share} of them real" in output
    assert (WARNING in output) == warned


@pytest.mark.parametrize("steps", [6, 600])
def test_microbatches_too_small_for_the_devices_are_padded_with_a_warning(
    train_output: Callable[..., str], steps: int
) -> None:
    """Eight rows are one per device, so two microbatches have sixteen rows, half of them empty."""
    output = train_output(24, steps=steps, accumulation=2)
    assert "teacher: batches of 16 rows of 24 tokens, 50% of them real" in output
    assert "change teacher.batch_size or teacher.row_length or teacher.accumulation to save time" in output


def test_truncated_texts_are_reported_once_for_each_data_set(checkpoint: str, capsys: pytest.CaptureFixture) -> None:
    model = Finetuner(
        "student", ModelConfig(checkpoint=checkpoint, max_length=5), ("bad", "good"), make_mesh(), eval_batch_size=8
    )

    def split(name: str, language: str, *texts: str) -> list[Example]:
        return [Example(f"a/task/{name}/{language}/{i}", text, None, i % 2, language) for i, text in enumerate(texts)]

    def output() -> str:
        return " ".join(capsys.readouterr().out.split())

    train, unlabelled = split("train", "en", "the film is good", "the film is", "the film " * 9), split("u", "en", "a")
    rest = "are longer than student.max_length, 5 tokens, and are truncated"
    model.dataset(split("test", "de", "der Film", "der Film ist"))
    assert output() == ""
    for expected in (f"warning: 2 of 3 texts of a/task/train/en {rest}", ""):
        model.dataset(train)
        assert output() == expected
    model.dataset(split("test", "de", "der Film ist gut", "gut"))
    assert output() == f"warning: 1 of 2 texts of a/task/test/de {rest}"
    model.dataset([train[2], train[1], *unlabelled], [train, unlabelled])  # a sample, of which one text is truncated
    assert output() == f"warning: 1 of 3 texts of a/task/train/en and a/task/u/en {rest}"
