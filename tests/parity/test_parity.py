"""The parity command shows that our encoder is the same function as the original, and fails if it is not."""

import dataclasses
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.fixtures.record import CASES, FIXTURES, record
from tests.helpers import tiny
from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf import families
from xtransfer.parity import __main__ as parity
from xtransfer.parity import activations, comparison, reference
from xtransfer.runtime import terminal

CLASSIFIER = FIXTURES / "bert_classifier"
CONFIG = EncoderConfig(vocab_size=9, hidden_size=4, num_layers=1, num_heads=2, intermediate_size=4, max_positions=20)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that PyTorch is not installed."""
    monkeypatch.setattr(reference, "available", lambda: False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a copy of a recorded checkpoint, to be modified."""
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "model"))


def edit(directory: Path, **changes: Any) -> None:
    """Change settings in a checkpoint's config."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_difference_by_hand() -> None:
    theirs = {"a": np.array([[1.0, -4.0], [0.5, 2.0]], np.float32), "b": np.array([0.5, 0.25], np.float32)}
    ours = {"a": np.array([[1.0, -4.25], [0.5, 2.125]], np.float32), "b": np.array([0.5, 0.25 + 2**-14], np.float32)}
    first, second = activations.compare(ours, theirs)
    assert first == activations.Difference("a", (2, 2), maximum=0.25, mean=0.09375, largest=4.0, worst=(0, 1))
    assert first.allowed == pytest.approx(4e-4) and not first.ok
    assert second == activations.Difference("b", (2,), maximum=2**-14, mean=2**-15, largest=0.5, worst=(1,))
    # The bound is not scaled below one: 6.1e-5 is within 1e-4.
    assert second.allowed == pytest.approx(1e-4) and second.ok


@pytest.mark.parametrize(("difference", "ok"), [(0.0, True), (0.99e-4, True), (1.01e-4, False), (np.nan, False)])
def test_tolerance(difference: float, ok: bool) -> None:
    (row,) = activations.compare({"a": np.array([0.0, difference])}, {"a": np.zeros(2)})
    assert row.ok == ok and row.worst == (int(difference != 0),)
    json.dumps(activations.records([row]), allow_nan=False)


def test_mismatched_activations_are_a_value_error() -> None:
    small, large = {"a": np.zeros(2)}, {"a": np.zeros(2), "logits": np.zeros(2)}
    for ours, theirs in ((small, large), (large, small), ({"a": np.zeros(3)}, small)):
        with pytest.raises(ValueError, match="; the reference has "):
            activations.compare(ours, theirs)
    assert len(activations.compare(small, small | {"prediction_logits": np.zeros(2)})) == 1


@pytest.mark.parametrize("name", ["bert_pretraining", "electra_classifier"])
def test_recorded_checkpoint_is_the_same_function(
    name: str, without_torch: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parity.main(["--model", str(FIXTURES / name), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    names = ["embeddings", "layer_1", "layer_2", "pooled"]
    if CASES[name].is_classifier:
        names.append("logits")
    assert [row["name"] for row in report["activations"]] == names and report["ok"]
    assert all(row["ok"] and row["max_difference"] <= 1e-5 for row in report["activations"])
    shown = capsys.readouterr().out
    assert "The same function: all" in shown and "recorded by torch" in shown and "| layer_2 | 31 × " in shown


def _swap_query_and_key(family: families.Family) -> families.Family:
    """Read query and key from each other's tensors, which have the same shapes."""

    def swap(source: str) -> str:
        if ".self.query." in source:
            return source.replace(".self.query.", ".self.key.")
        return source.replace(".self.key.", ".self.query.")

    rules = tuple(dataclasses.replace(rule, source=swap(rule.source)) for rule in family.rules)
    return dataclasses.replace(family, rules=rules)


def _with_head_activation(name: str) -> Callable[[families.Family], families.Family]:
    return lambda family: dataclasses.replace(family, defaults=(*family.defaults, ("head_act", name)))


@pytest.mark.parametrize(
    ("name", "changes", "change", "first"),
    [
        ("bert_classifier", {"layer_norm_eps": 1e-3}, None, "embeddings"),
        ("bert_classifier", {"num_attention_heads": 5}, None, "layer_1"),
        ("bert_classifier", {}, _swap_query_and_key, "layer_1"),
        ("bert_classifier", {}, _with_head_activation("relu"), "pooled"),
        ("roberta_classifier", {"pad_token_id": 1}, None, "embeddings"),
    ],
)
def test_first_differing_activation_is_reported(
    name: str,
    changes: dict[str, Any],
    change: Callable[[families.Family], families.Family] | None,
    first: str,
    without_torch: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))
    edit(directory, **changes)
    if change is not None:
        kind = name.partition("_")[0]
        monkeypatch.setitem(families.FAMILIES, kind, change(families.FAMILIES[kind]))
    with pytest.raises(SystemExit) as caught:
        parity.main(["--model", str(directory), "--json", str(tmp_path / "report.json")])
    assert caught.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    wrong = [row["name"] for row in report["activations"] if not row["ok"]]
    assert wrong[0] == first and wrong[-1] == "logits" and not report["ok"]
    shown = capsys.readouterr().out
    assert f"NOT the same function: {len(wrong)} of 5 activations differ too much, first {first} (by " in shown
    assert [line.split(" ")[1] for line in shown.splitlines() if line.endswith("| NO |")] == wrong


def test_mean_pooling_head_is_compared_on_the_first_token(directory: Path, without_torch: None) -> None:
    edit(directory, xtransfer_pooling="mean")
    report = comparison.check(directory)
    assert report.ok and report.rows[-1].name == "logits"
    assert any("pools by mean" in note for note in report.notes)


def test_recorded_reference_replaces_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    model, file = tiny.checkpoint(tmp_path / "model", layers=2), tmp_path / "recorded" / "reference.safetensors"
    live = comparison.check(model, record=file)
    assert live.ok and "computed live by torch" in live.source
    assert any("sentences" in note for note in live.notes) and live.rows[1].shape[1:] == (16,)
    monkeypatch.setattr(reference, "available", lambda: False)
    recorded = comparison.check(model, file)
    assert recorded.rows == live.rows
    inputs = reference.load(file, model).inputs
    lengths = inputs["attention_mask"].sum(-1)
    assert len(lengths) == 13 and lengths.max() == 32 and lengths.min() <= 4  # 32 are all the positions of the model
    assert inputs["token_type_ids"][-1].any() and not inputs["token_type_ids"][:-1].any()  # only the last is a pair
    with pytest.raises(UserError, match="model: nothing to compare with; install torch, or record a reference with"):
        comparison.check(model)
    with pytest.raises(UserError, match="--record needs PyTorch, which is not installed"):
        comparison.check(model, record=file)


def test_random_ids_are_compared_without_tokenizer_and_head(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    record(CASES["roberta_masked"], tmp_path / "model", seed=2)
    (tmp_path / "model" / reference.FILE).unlink()
    report = comparison.check(tmp_path / "model")
    assert report.ok and [row.name for row in report.rows] == ["embeddings", "layer_1", "layer_2"]
    assert "inputs are random token ids (" in report.notes[1] and "no logits to compare" in report.notes[-1]


def test_other_files_are_not_overwritten(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"; leave out --reference"):
        comparison.check(directory, directory / reference.FILE, directory / "new")
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"model\.safetensors exists and is not a reference"):
        comparison.check(directory, record=directory / "model.safetensors")
    assert (directory / "model.safetensors").read_bytes() == weights


def test_stale_reference_is_an_error(directory: Path, without_torch: None) -> None:
    config = hf_config.read_config(directory)
    _, params = hf_checkpoint.load_classifier(directory, 3, seed=0)
    params["head"]["bias"].set_value(params["head"]["bias"][...] + 1e-6)
    shutil.rmtree(directory / "..", ignore_errors=True)
    hf_checkpoint.save(directory, config, params)
    with pytest.raises(UserError, match="is stale: it was recorded from other weights"):
        comparison.check(directory, CLASSIFIER / reference.FILE)


def test_random_inputs_fit_the_model() -> None:
    config = dataclasses.replace(CONFIG, pad_id=3, position_offset=4)
    inputs = activations.random_inputs(config)
    real = inputs["attention_mask"] == 1
    assert real.sum(-1).tolist() == [1, 2, 3, 5, 8, 13, 16]  # 20 positions, the first four unused
    assert set(inputs["input_ids"][real].tolist()) == set(range(9)) - {3} and set(inputs["input_ids"][~real]) == {3}
    assert inputs["token_type_ids"][3, :6].tolist() == [0, 0, 0, 1, 1, 0]
    batch = activations.batch_of(inputs, config)
    assert batch["position_ids"][3].tolist() == [4, 5, 6, 7, 8, *[4] * 11] and batch["cls_index"].shape == (7, 1)
    for types in (0, 1):
        assert not activations.random_inputs(dataclasses.replace(config, type_vocab_size=types))["token_type_ids"].any()


def test_pad_token_within_a_text_has_robertas_position() -> None:
    ids = (np.asarray([0, 5, 3, 6, 3, 7]), np.zeros(6))
    for family, expected in (("roberta", [4, 5, 3, 6, 3, 7]), ("bert", [4, 5, 6, 7, 8, 9])):
        config = dataclasses.replace(CONFIG, pad_id=3, position_offset=4, family=family)
        assert activations.batch_of(activations.pad([ids], config), config)["position_ids"].tolist() == [expected]


def test_model_with_one_token_type_gets_no_pair(tmp_path: Path) -> None:
    directory = tiny.checkpoint(tmp_path / "model")
    assert comparison._inputs(directory)[1].endswith("languages and a pair, tokenized by the model's own tokenizer")
    edit(directory, type_vocab_size=1)
    inputs, note = comparison._inputs(directory)
    assert len(inputs["input_ids"]) == len(comparison.SENTENCES) and not inputs["token_type_ids"].any()
    assert "tokenized by the model's own tokenizer, and no pair (" in note and "pairs have 2 token types" in note


@pytest.mark.parametrize("width", [50, 80, 200])
def test_terminal_of_any_width_shows_every_digit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        activations.Difference("embeddings", (378, 1024), 1.25e-6, 3.5e-8, 12.5, (3, 4)),
        activations.Difference("layer_1", (378, 1024), 2.5e-2, 3.5e-3, 8.25, (7, 8)),
    )
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, soft_wrap=True)
    monkeypatch.setattr(terminal, "console", console)
    parity.show(comparison.Report(Path("some/model"), "computed live", ("a note",), rows))
    table, _, rest = screen.getvalue().partition("a note")
    assert "NOT the same function: 1 of 2 activations differ too much, first layer_1 (by 2.50e-02 at [7, 8]" in rest
    texts = ("embeddings", "378 × 1024", "1.25e-06", "3.50e-08", "12.5", "1.25e-03", "yes")
    texts += ("layer_1", "378 × 1024", "2.50e-02", "3.50e-03", "8.25", "8.25e-04", "NO")
    if width >= 80:
        assert all(text in table for text in texts)
    # Cells wrap on a narrow terminal, but lose no characters.
    title = "Parity of some/model with the reference computed live"
    expected = Counter("".join((title, *parity.HEADER, *texts)).replace(" ", ""))
    assert Counter("".join(table.split()).replace("─", "")) == expected
