"""Pretraining on tiny text: what it writes, how it resumes, and which recipes are an error."""

import contextlib
import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import tiny
from xtransfer.config import PretrainConfig, TaskConfig
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf import tokenizer as hf_tokenizer
from xtransfer.pretrain import __main__ as pretrain
from xtransfer.pretrain import pretraining
from xtransfer.runtime import terminal


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Return a recipe that trains for a few seconds on unlabelled text in two languages."""
    data = tiny.write_task(tmp_path_factory.mktemp("text"), train=200)
    for language in ("en", "de"):
        rows = (data / language / "train.tsv").read_text().splitlines()[1:]
        texts = [row.partition("\t")[0] for row in rows]
        lines = [f"{a}. {b}." for a, b in zip(texts[::2], texts[1::2], strict=True)]
        (data / language / "unlabelled.tsv").write_text("\n".join(["text", *lines, ""]))
    return PretrainConfig(
        task=TaskConfig(name="files", data_dir=str(data), source_language="en"),
        languages=("en", "de"),
        vocab_size=100,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        max_positions=32,
        row_length=16,
        rows=8,
        masks=3,
        learning_rate=1e-2,
        steps=60,
    )


@pytest.fixture(scope="module")
def checkpoint(settings, tmp_path_factory):
    """Return the checkpoint of an uninterrupted run."""
    output = tmp_path_factory.mktemp("checkpoints") / "mini"
    pretraining.pretrain(settings, output)
    return output


def assert_same_weights(checkpoint, other_checkpoint):
    weights, other = (load_file(path / "model.safetensors") for path in (checkpoint, other_checkpoint))
    assert weights.keys() == other.keys()
    for name in weights:
        np.testing.assert_array_equal(weights[name], other[name], err_msg=name)


def test_checkpoint_loads_with_its_tokenizer(settings, checkpoint):
    architecture, tokenizer = hf_config.read_config(checkpoint), load_tokenizer(checkpoint)
    hf_tokenizer.check_tokenizer(checkpoint, tokenizer)
    assert (architecture.hidden_size, architecture.num_layers, architecture.hidden_dropout) == (16, 1, 0.1)
    assert tokenizer.tokenize("The FILM") == ["the", "film"]
    hf_checkpoint.load_classifier(checkpoint, 2, seed=0)
    hf_checkpoint.load_masked_lm(checkpoint, seed=0)
    assert {array.dtype for array in load_file(checkpoint / "model.safetensors").values()} == {np.dtype("float16")}


def test_recipe_log_and_card_are_saved_with_the_weights(settings, checkpoint):
    recipe = json.loads((checkpoint / "pretraining.json").read_text())
    assert recipe["steps"] == 60
    assert recipe["task"]["data_dir"] == ""  # the recipe is published without local directories
    log = (checkpoint / "pretraining.jsonl").read_text().splitlines()
    card = (checkpoint / "README.md").read_text()
    assert f"the loss is {json.loads(log[-1])['masked']:.3f} nats per masked token" in card
    assert "seed 0" in card


def test_loss_falls(checkpoint):
    log = [json.loads(line) for line in (checkpoint.with_name("mini.work") / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 60
    # This is well below a uniform guess, because the word order of the text follows rules.
    assert log[-1]["masked"] < 0.8 * np.log(len(load_tokenizer(checkpoint)))


def test_an_interrupted_run_writes_the_same_weights(settings, checkpoint, tmp_path, monkeypatch):
    # Training a tokenizer is not deterministic, so the interrupted run gets the same tokenizer.
    shutil.copytree(checkpoint.with_name("mini.work") / "tokenizer", tmp_path / "mini.work" / "tokenizer")
    polls = iter([False] * 29 + [True] * 100)
    monkeypatch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
    with pytest.raises(SystemExit):
        pretraining.pretrain(settings, tmp_path / "mini")
    assert not (tmp_path / "mini").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"learning_rate: 0\.01 → 0\.02"):
        pretraining.pretrain(dataclasses.replace(settings, learning_rate=0.02), tmp_path / "mini")
    pretraining.pretrain(settings, tmp_path / "mini")
    assert_same_weights(checkpoint, tmp_path / "mini")


def test_start_from_a_checkpoint(settings, checkpoint, tmp_path):
    """One step at a learning rate of zero leaves the weights of the start unchanged."""
    more = dataclasses.replace(settings, start_from=str(checkpoint), steps=1, learning_rate=0.0, hidden_size=64)
    pretraining.pretrain(more, tmp_path / "more")
    assert_same_weights(checkpoint, tmp_path / "more")
    assert (tmp_path / "more" / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "more" / "pretraining.json").read_text())["start_from"] == "mini"
    assert json.loads((tmp_path / "more" / "start-pretraining.json").read_text())["steps"] == 60
    assert "pretrained further from `mini`" in (tmp_path / "more" / "README.md").read_text()


def test_existing_output_is_an_error(tmp_path):
    with pytest.raises(UserError, match="already exists"):
        pretrain.main(["--config", "unread.py", "--output", str(tmp_path)])


def test_partner_terms_by_hand():
    """Examples 0 and 1 are partners with cosine 0.6. Examples 2 and 3 have no partner and are no candidates."""
    pooled = jnp.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 0.0]])
    (loss, count), (correct, total) = pretraining._partner_terms(pooled, jnp.array([1, 0, -1, -1]))
    assert (float(count), float(correct), float(total)) == (2.0, 2.0, 2.0)
    assert float(loss) == pytest.approx(0.0, abs=1e-5)  # each has only one candidate
    # If 2 and 3 are partners too, 0 mistakes 2 (cosine 1) for its partner. Its loss is ln(e^6 + e^10 + e^0) - 6.
    pooled = jnp.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    (loss, count), (correct, _) = pretraining._partner_terms(pooled, jnp.array([1, 0, 3, 2]))
    by_hand = [np.log(np.exp(6) + np.exp(10) + 1) - 6, np.log(2 * np.exp(6) + np.exp(8)) - 6]
    by_hand += [np.log(np.exp(10) + np.exp(6) + 1), np.log(2 + np.exp(8))]
    assert float(loss) == pytest.approx(sum(by_hand), rel=1e-4)
    assert (float(count), float(correct)) == (4.0, 0.0)


def test_sinusoids_by_hand():
    table = pretraining._sinusoids(3, 4)
    np.testing.assert_allclose(table[0], [0, 1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(table[1], [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)], atol=1e-12)
