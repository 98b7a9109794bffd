"""Pretraining on tiny text: what it writes, that it goes on where it stopped, what it refuses."""

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
    """A config of a few seconds, on unlabelled text in two languages."""
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
def written(settings, tmp_path_factory):
    """The checkpoint of a whole run."""
    output = tmp_path_factory.mktemp("checkpoints") / "mini"
    pretraining.pretrain(settings, output)
    return output


def test_the_checkpoint_is_read_back_with_its_tokenizer(settings, written):
    architecture, tokenizer = hf_config.read_config(written), load_tokenizer(written)
    hf_tokenizer.check_tokenizer(written, tokenizer)
    assert (architecture.hidden_size, architecture.num_layers, architecture.hidden_dropout) == (16, 1, 0.1)
    assert tokenizer.tokenize("The FILM") == ["the", "film"]
    hf_checkpoint.load_classifier(written, 2, seed=0)
    hf_checkpoint.load_masked_lm(written, seed=0)
    assert {array.dtype for array in load_file(written / "model.safetensors").values()} == {np.dtype("float16")}


def test_recipe_log_and_card_lie_beside_the_weights(settings, written):
    recipe = json.loads((written / "pretraining.json").read_text())
    assert recipe["steps"] == 60
    assert recipe["task"]["data_dir"] == ""  # a directory of this machine is nobody else's business
    log = (written / "pretraining.jsonl").read_text().splitlines()
    card = (written / "README.md").read_text()
    assert f"masked tokens {json.loads(log[-1])['masked']:.3f} nats" in card
    assert "seed 0" in card


def test_it_learns(written):
    log = [json.loads(line) for line in (written.with_name("mini.work") / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 60
    # Far below a guess over all tokens there are: the words of such a text follow one another by rule.
    assert log[-1]["masked"] < 0.8 * np.log(len(load_tokenizer(written)))


def test_an_interrupted_run_writes_the_same_weights(settings, written, tmp_path, monkeypatch):
    # A tokenizer's training is not deterministic, so both runs get the one there is.
    shutil.copytree(written.with_name("mini.work") / "tokenizer", tmp_path / "mini.work" / "tokenizer")
    polls = iter([False] * 29 + [True] * 100)
    monkeypatch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
    with pytest.raises(SystemExit):
        pretraining.pretrain(settings, tmp_path / "mini")
    assert not (tmp_path / "mini").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"learning_rate: 0\.01 → 0\.02"):
        pretraining.pretrain(dataclasses.replace(settings, learning_rate=0.02), tmp_path / "mini")
    pretraining.pretrain(settings, tmp_path / "mini")
    one, other = (load_file(path / "model.safetensors") for path in (written, tmp_path / "mini"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_going_on_from_a_checkpoint(settings, written, tmp_path):
    """One step at no learning rate leaves the weights as they are: nothing but the start went into them."""
    more = dataclasses.replace(settings, start_from=str(written), steps=1, learning_rate=0.0, hidden_size=64)
    pretraining.pretrain(more, tmp_path / "more")
    one, other = (load_file(path / "model.safetensors") for path in (written, tmp_path / "more"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert (tmp_path / "more" / "tokenizer.json").read_text() == (written / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "more" / "pretraining.json").read_text())["start_from"] == "mini"
    assert json.loads((tmp_path / "more" / "start-pretraining.json").read_text())["steps"] == 60
    assert "pretrained further from `mini`" in (tmp_path / "more" / "README.md").read_text()


def test_an_output_that_exists_is_refused(tmp_path):
    with pytest.raises(UserError, match="already exists"):
        pretrain.main(["--config", "unread.py", "--output", str(tmp_path)])


def test_partner_terms_by_hand():
    """Three vectors: 0 and 1 are partners at cosine 0.6, and 2 is a stranger to both, apart from the candidates."""
    pooled = jnp.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 0.0]])
    (loss, count), (right, of) = pretraining._partner_terms(pooled, jnp.array([1, 0, -1, -1]))
    assert (float(count), float(right), float(of)) == (2.0, 2.0, 2.0)
    assert float(loss) == pytest.approx(0.0, abs=1e-5)  # each has one candidate only
    # With 2 and 3 partners too, 0 takes 2 (cosine 1) for its partner, at a loss of ln(e^6 + e^10 + e^0) - 6.
    pooled = jnp.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    (loss, count), (right, _) = pretraining._partner_terms(pooled, jnp.array([1, 0, 3, 2]))
    by_hand = [np.log(np.exp(6) + np.exp(10) + 1) - 6, np.log(2 * np.exp(6) + np.exp(8)) - 6]
    by_hand += [np.log(np.exp(10) + np.exp(6) + 1), np.log(2 + np.exp(8))]
    assert float(loss) == pytest.approx(sum(by_hand), rel=1e-4)
    assert (float(count), float(right)) == (4.0, 0.0)


def test_sinusoids_by_hand():
    table = pretraining._sinusoids(3, 4)
    np.testing.assert_allclose(table[0], [0, 1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(table[1], [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)], atol=1e-12)
