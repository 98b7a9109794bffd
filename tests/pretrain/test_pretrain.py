"""Pretraining on tiny text: what it writes, how it resumes, and which recipes are an error."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.fixtures.record import FIXTURES
from tests.helpers import events, tiny
from xtransfer.config import PretrainConfig, TaskConfig
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf import tokenizer as hf_tokenizer
from xtransfer.models.hf.families import FAMILIES
from xtransfer.pretrain import __main__ as pretrain
from xtransfer.pretrain import pretraining
from xtransfer.runtime import terminal
from xtransfer.train.tensorboard import TensorBoard
from xtransfer.train.tracking import LoggerSource


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
    assert f"the loss is {json.loads(log[-1])['masked']:.3f} nats per masked token" in " ".join(card.split())
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
    card = (tmp_path / "more" / "README.md").read_text()
    assert "pretrained further from `mini`" in card and "license:" not in card and "other half" not in card


def test_existing_output_is_an_error(tmp_path):
    with pytest.raises(UserError, match="already exists"):
        pretrain.main(["--config", "unread.py", "--output", str(tmp_path)])


def test_loss_by_hand():
    """Two words with even odds cost ln 2 each, and an unused position nothing. No example has a partner."""

    class Uniform:
        def encode(self, batch, dropout_key):
            return jnp.ones((1, 4, 2))

        def token_logits(self, hidden, batch):
            return jnp.zeros((1, 3, 2))

    batch = {
        "segment_ids": jnp.array([[1, 1, 1, 0]]),
        "cls_index": jnp.zeros((1, 2), jnp.int32),
        "partner": jnp.full((1, 2), -1),
        "mlm_targets": jnp.zeros((1, 3), jnp.int32),
        "mlm_weight": jnp.array([[1.0, 1.0, 0.0]]),
    }
    terms = pretraining._loss(0.5)(Uniform(), batch, jax.random.key(0))
    assert [float(x) for x in terms["masked"]] == [pytest.approx(2 * np.log(2)), 2.0]
    assert [float(x) for x in terms["loss"]] == [pytest.approx(np.log(2)), 1.0]
    assert [float(x) for x in terms["partner"]] == [0.0, 0.0]


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


@pytest.mark.parametrize("name", ["roberta_masked", "distilbert_masked", "electra_masked", "electra_classifier"])
def test_every_family_with_a_language_model_continues(name, settings, tmp_path, capsys):
    """ELECTRA's discriminator and its classifiers have no such head, so they get a new one."""
    start = shutil.copytree(FIXTURES / name, tmp_path / "start")
    # RoBERTa's ids: the first token is 0, padding 1, and the separator 2.
    order = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]") if name.startswith("roberta") else tiny.SPECIAL
    tiny.word_tokenizer(order).save_pretrained(start)
    more = dataclasses.replace(settings, start_from=str(start), steps=2, row_length=12)
    pretraining.pretrain(more, tmp_path / "more")
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "more" / "model.safetensors")
    (words,) = [key for key in before if key.endswith("word_embeddings.weight")]
    assert np.abs(before[words] - after[words]).max() > 1e-3
    family = FAMILIES[name.partition("_")[0]]
    head = {family.source(path)[0] for path in ("transform.kernel", "transform_norm.scale", "decoder_bias")}
    assert head <= set(after)
    if name.endswith("_masked"):
        assert all(0 < np.abs(before[key] - after[key]).max() < 0.2 for key in head)
    (architecture,) = json.loads((tmp_path / "more" / "config.json").read_text())["architectures"]
    assert architecture.endswith("ForMaskedLM")
    assert ("has no language model's head" in capsys.readouterr().out) == (name == "electra_classifier")
    hf_checkpoint.load_masked_lm(tmp_path / "more", seed=0)
    assert hf_config.read_config(tmp_path / "more") == hf_config.read_config(start)
    hf_checkpoint.load_classifier(tmp_path / "more", 2, seed=0)


def test_a_tokenizer_without_a_mask_token_is_refused(settings, checkpoint, tmp_path):
    start = shutil.copytree(checkpoint, tmp_path / "start")
    config = json.loads((start / "tokenizer_config.json").read_text())
    config["mask_token"] = None
    (start / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no mask token, so it cannot be pretrained further"):
        pretraining.pretrain(dataclasses.replace(settings, start_from=str(start)), tmp_path / "more")


def test_unlabelled_files_are_enough(settings, tmp_path):
    for language in ("en", "de"):
        (tmp_path / "data" / language).mkdir(parents=True)
        (tmp_path / "data" / language / "unlabelled.tsv").write_text("text\nthe film is good\nder Film ist gut\n")
    task = dataclasses.replace(settings.task, data_dir=str(tmp_path / "data"))
    pretraining.pretrain(dataclasses.replace(settings, task=task, steps=1), tmp_path / "mini")
    assert (tmp_path / "mini" / "model.safetensors").is_file()


def test_rows_that_devices_cannot_share_are_refused(settings, tmp_path):
    with pytest.raises(UserError, match="config key rows is 12; choose a multiple of the 8 devices"):
        pretraining.pretrain(dataclasses.replace(settings, rows=12), tmp_path / "mini")


def test_a_language_without_text_is_refused(settings, tmp_path):
    data = tiny.write_task(tmp_path / "data", train=20)
    (data / "en" / "unlabelled.tsv").write_text("text\nthe film is good\n")
    task = dataclasses.replace(settings.task, data_dir=str(data))
    with pytest.raises(UserError, match="de.*unlabelled"):
        pretraining.pretrain(dataclasses.replace(settings, task=task), tmp_path / "mini")
    pretraining.pretrain(dataclasses.replace(settings, steps=1), tmp_path / "mini")


def test_sinusoids_by_hand():
    table = pretraining._sinusoids(3, 4)
    np.testing.assert_allclose(table[0], [0, 1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(table[1], [np.sin(1), np.cos(1), np.sin(0.01), np.cos(0.01)], atol=1e-12)


def test_tensorboard_follows_pretraining(settings, tmp_path):
    recipe = dataclasses.replace(settings, steps=6, warmup_fraction=0.5)
    pretraining.pretrain(recipe, tmp_path / "mini", loggers=[LoggerSource("--tensorboard", TensorBoard)])
    curves = events.curves(tmp_path / "mini.work")
    rates = {"train/learning_rate", "train/examples_per_second", "train/real_token_share"}
    assert curves.keys() == {"train/loss", "train/masked", *rates}
    (row,) = [json.loads(line) for line in (tmp_path / "mini.work" / "metrics.jsonl").read_text().splitlines()]
    assert curves["train/masked"] == [(6, float(np.float32(row["masked"])))]
    # Warm-up over 3 updates to 1e-2. The sixth step is two thirds down a half cosine: (1 + cos(2π / 3)) / 2 = 1 / 4.
    ((step, rate),) = curves["train/learning_rate"]
    assert step == 6 and rate == pytest.approx(1e-2 / 4, rel=1e-5)
