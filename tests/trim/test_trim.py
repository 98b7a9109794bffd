"""The command: every head is kept, runs are trimmed too, the report is right, and bad input is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.helpers import tiny, tiny_run
from tests.helpers.trimming import run
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.weights import leaves
from xtransfer.runs.classifier import open_classifier
from xtransfer.runtime import sharding
from xtransfer.trim import __main__ as trim
from xtransfer.trim import text, trimming
from xtransfer.trim.text import Agreement
from xtransfer.trim.trimming import Report, Size


def test_rows_follow_their_pieces_and_heads_are_kept(tmp_path: Path) -> None:
    """A language model with a next-sentence head: embeddings and decoder bias lose rows, everything else stays."""
    base = tiny.checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["cls.predictions.bias"] = np.arange(len(tensors["cls.predictions.bias"]), dtype=np.float32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run(base, ["the film", "sehr gut"], tmp_path / "model")
    old, new = load_tokenizer(base).get_vocab(), load_tokenizer(tmp_path / "model").get_vocab()
    assert set(new) == {*tiny.SPECIAL, "the", "film", "sehr", "gut"}
    trimmed = load_file(tmp_path / "model" / "model.safetensors")
    by_piece = {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}
    assert trimmed.keys() == tensors.keys()
    for name in tensors:
        rows = [old[piece] for piece in sorted(new, key=new.__getitem__)] if name in by_piece else slice(None)
        np.testing.assert_array_equal(trimmed[name], tensors[name][rows], err_msg=name)
    graphdef, params = hf_checkpoint.load_masked_lm(tmp_path / "model", seed=0)
    assert nnx.merge(graphdef, params).decoder_bias.shape == (9,)


def test_half_precision_stays(tmp_path: Path) -> None:
    report = run(Path("mini-bert-multilingual"), ["Der Roman ist spannend."], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float16)}
    size = report["after"]["parameters"]
    assert report["after"]["weights"] == 2 * size == 2 * sum(array.size for array in tensors.values())
    assert report["before"]["parameters"] - size == (6000 - report["after"]["pieces"]) * (128 + 1)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\n") and "kept" in card.partition("## Trimmed vocabulary")[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a finished workdir, with mean pooling for the teacher alone."""
    root = tmp_path_factory.mktemp("root")
    return tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")


def test_finished_run_is_trimmed(workdir: Any, tmp_path: Path) -> None:
    mesh = sharding.make_mesh()
    directory = workdir.student("vanilla", 0)
    run(directory, ["the film is good", "film sehr gut"], tmp_path / "model")
    original, trimmed = (open_classifier(path, mesh) for path in (directory, tmp_path / "model"))
    assert (trimmed.labels, trimmed.max_length, trimmed.pooling) == (original.labels, original.max_length, "cls")
    old, new = original.tokenizer.get_vocab(), trimmed.tokenizer.get_vocab()
    path = "encoder.embeddings.word_embeddings.embedding"
    for piece in new:
        rows = (leaves(model.params)[path][...][ids[piece]] for model, ids in ((original, old), (trimmed, new)))
        np.testing.assert_array_equal(*map(np.asarray, rows))


def test_mean_pooling_stays_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.checkpoint(tmp_path / "base")
    config, tokenizer = hf_config.read_config(base), load_tokenizer(base)
    _, params = hf_checkpoint.load_classifier(base, 2, seed=0, pooling="mean")
    hf_checkpoint.save(tmp_path / "mean", config, params, tokenizer=tokenizer, labels=("a", "b"), pooling="mean")
    run(tmp_path / "mean", ["film"], tmp_path / "model")
    assert hf_config.read_pooling(tmp_path / "model") == "mean"
    assert "warning: this classifier pools by mean, which transformers does not support" in capsys.readouterr().out


def test_limits_and_check_are_reported(tmp_path: Path) -> None:
    """The tokenizer has no pieces below words, so a dropped word is unknown."""
    base = tiny.checkpoint(tmp_path / "base")
    other = tmp_path / "other.txt"
    other.write_text("good film\nvery bad film\n", encoding="utf-8")
    report = run(base, ["film film good", "good the"], tmp_path / "one", "--check", str(other), "--min-count", "2")
    assert not report["complete"] and report["after"]["pieces"] == 5 + 2
    assert report["text"] | {"first": ""} == {
        "texts": 2,
        "same": 1,
        "tokens": [5, 5],
        "unknown": [0, 1],
        "first": "",
        "clipped": 0,
    }
    assert report["text"]["first"].endswith("one.jsonl:2")
    assert report["check"] == {
        "texts": 2,
        "same": 1,
        "tokens": [5, 5],
        "unknown": [0, 2],
        "first": f"{other}:2",
        "clipped": 0,
    }
    assert run(base, ["film film good"], tmp_path / "two", "--keep-pieces", "1")["after"]["pieces"] == 5 + 1


def test_tables_show_the_report() -> None:
    before, after = Size(1000, 20_000, 80_000_000, 400_000), Size(250, 5_000, 20_000_000, 100_000)
    agreement = Agreement(4, 3, (1000, 1100), (0, 11), "x:3")
    sizes, texts = trim.tables(Report(before, after, True, agreement, None))
    assert sizes.rows[0] == ("pieces", "1,000", "250", "25.0%")
    assert sizes.rows[2] == ("weights, MB", "80.00", "20.00", "25.0%")
    assert texts.rows == (("text", "4", "75.0%", "1,000", "1,100", "0.00%", "1.00%"),)
    both = trim.tables(Report(before, after, True, agreement, agreement))[1]
    assert [row[0] for row in both.rows] == ["text", "check"]


def test_errors_are_one_line(tmp_path: Path) -> None:
    base = tiny.checkpoint(tmp_path / "base")
    text = tmp_path / "a.txt"
    text.write_text("film\n", encoding="utf-8")

    def error(*flags: str) -> str:
        with pytest.raises(UserError) as caught:
            trim.main(list(flags))
        assert not (tmp_path / "model").exists()
        return str(caught.value)

    common = ("--text", str(text), "--output", str(tmp_path / "model"))
    wordlevel = tiny.roberta(tmp_path / "wordlevel")
    assert "a WordLevel tokenizer cannot be trimmed" in error("--model", str(wordlevel), *common)
    assert "no such file" in error("--model", str(base), *common, "--check", str(tmp_path / "b.txt"))
    assert "not a directory, a hub id" in error("--model", str(tmp_path / "nothing"), *common)
    occupied = error("--model", str(base), "--text", str(text), "--output", str(base))
    assert occupied == f"{base} already exists; choose a new directory"
    report = error("--model", str(base), *common, "--json", str(text))
    assert report == f"{text} already exists; choose another file for --json"
    assert f"{text}/x cannot be written: " in error("--model", "nothing", *common, "--json", str(text / "x"))


def test_texts_without_any_piece_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}/base: its vocabulary has no piece for any of the texts; give"):
        run(tiny.checkpoint(tmp_path / "base"), ["\U0001f600", "本"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_clipped_texts_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "CHARACTER_LIMIT", 10)
    base = tiny.checkpoint(tmp_path / "base")
    report = run(base, ["film " * 3, "film"], tmp_path / "model")
    assert report["text"]["clipped"] == 1
    warning = (
        "warning: 1 of 2 texts of --text were read only up to 1,048,576 characters; give each text a line of its own"
    )
    assert warning in capsys.readouterr().out


def test_full_temporary_directory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tokenizers reports a full disk: an Exception of no narrower class."""
    from transformers import PreTrainedTokenizerFast

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    base = tiny.checkpoint(tmp_path / "base")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(UserError, match="temporary directory: No space left on device .*; free some space, or name an"):
        run(base, ["film"], tmp_path / "model")


def test_tokenizer_that_transformers_builds_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a tokenizer class that adds tokens of its own to the vocabulary."""
    base = tiny.checkpoint(tmp_path / "base")
    monkeypatch.setattr(trimming, "_load_trimmed", lambda *_: tiny.word_tokenizer())
    with pytest.raises(UserError, match="token '.*' would get the id .* and not None: its tokenizer cannot be trimmed"):
        run(base, ["film"], tmp_path / "model")


def test_command_runs_as_a_process(tmp_path: Path) -> None:
    base = tiny.checkpoint(tmp_path / "base")
    (tmp_path / "a.txt").write_text("the film\n", encoding="utf-8")
    command = [sys.executable, "-m", "xtransfer.trim", "--model", str(base), "--text", str(tmp_path / "a.txt")]
    command += ["--output", str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result
    assert "| pieces |" in result.stdout and f"{tmp_path}/model: wrote the trimmed model" in result.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr.splitlines() == [f"error: {tmp_path}/model already exists; choose a new directory"]
