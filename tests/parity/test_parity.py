"""The proof that our encoder is the original's function, and that the proof fails where it is not."""

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
from xtransfer.parity import __main__ as binary
from xtransfer.parity import activations, comparison, reference
from xtransfer.runtime import terminal

CLASSIFIER = FIXTURES / "bert_classifier"
CONFIG = EncoderConfig(vocab_size=9, hidden_size=4, num_layers=1, num_heads=2, intermediate_size=4, max_positions=20)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may be here: it is not to be found."""
    monkeypatch.setattr(reference, "available", lambda: False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a fixture, to be spoilt."""
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "model"))


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_row_by_hand() -> None:
    theirs = {"a": np.array([[1.0, -4.0], [0.5, 2.0]], np.float32), "b": np.array([0.5, 0.25], np.float32)}
    ours = {"a": np.array([[1.0, -4.25], [0.5, 2.125]], np.float32), "b": np.array([0.5, 0.25 + 2**-14], np.float32)}
    first, second = activations.compare(ours, theirs)
    assert first == activations.Difference("a", (2, 2), maximum=0.25, mean=0.09375, largest=4.0, worst=(0, 1))
    assert first.allowed == pytest.approx(4e-4) and not first.ok
    assert second == activations.Difference("b", (2,), maximum=2**-14, mean=2**-15, largest=0.5, worst=(1,))
    assert second.allowed == pytest.approx(1e-4) and second.ok  # not relative below one: 6.1e-5 is within 1e-4


@pytest.mark.parametrize(("difference", "ok"), [(0.0, True), (0.99e-4, True), (1.01e-4, False), (np.nan, False)])
def test_the_tolerance(difference: float, ok: bool) -> None:
    (row,) = activations.compare({"a": np.array([0.0, difference])}, {"a": np.zeros(2)})
    assert row.ok == ok and row.worst == (int(difference != 0),)
    json.dumps(activations.records([row]), allow_nan=False)


def test_what_only_one_side_has_is_no_comparison() -> None:
    one, other = {"a": np.zeros(2)}, {"a": np.zeros(2), "logits": np.zeros(2)}
    for ours, theirs in ((one, other), (other, one), ({"a": np.zeros(3)}, one)):
        with pytest.raises(ValueError, match="of the reference"):
            activations.compare(ours, theirs)
    assert len(activations.compare(one, one | {"prediction_logits": np.zeros(2)})) == 1


@pytest.mark.parametrize("name", ["bert_pretraining", "electra_classifier"])
def test_a_recorded_checkpoint_is_the_same_function(
    name: str, without_torch: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    binary.main(["--model", str(FIXTURES / name), "--json", str(tmp_path / "report.json")])
    found = json.loads((tmp_path / "report.json").read_text())
    names = ["embeddings", "layer_1", "layer_2", "pooled", *["logits"] * CASES[name].is_classifier]
    assert [row["name"] for row in found["activations"]] == names and found["ok"]
    assert all(row["ok"] and row["max_difference"] <= 1e-5 for row in found["activations"])
    shown = capsys.readouterr().out
    assert "The same function: all" in shown and "recorded by torch" in shown and "| layer_2 | 31 × " in shown


def _swapped(family: families.Family) -> families.Family:
    """Query and key read from each other's tensors: every shape still fits."""
    names = {".self.query.": ".self.key.", ".self.key.": ".self.query."}
    rules = [
        dataclasses.replace(rule, source=rule.source.replace(old, names[old]))
        if (old := next((part for part in names if part in rule.source), None))
        else rule
        for rule in family.rules
    ]
    return dataclasses.replace(family, rules=tuple(rules))


def _activation(name: str) -> Callable[[families.Family], families.Family]:
    return lambda family: dataclasses.replace(family, defaults=(*family.defaults, ("head_act", name)))


@pytest.mark.parametrize(
    ("name", "changes", "change", "first"),
    [
        ("bert_classifier", {"layer_norm_eps": 1e-3}, None, "embeddings"),
        ("bert_classifier", {"num_attention_heads": 5}, None, "layer_1"),
        ("bert_classifier", {}, _swapped, "layer_1"),
        ("bert_classifier", {}, _activation("relu"), "pooled"),
        ("roberta_classifier", {"pad_token_id": 1}, None, "embeddings"),
    ],
)
def test_another_function_is_found_where_it_begins(
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
        binary.main(["--model", str(directory), "--json", str(tmp_path / "report.json")])
    assert caught.value.code == 1
    found = json.loads((tmp_path / "report.json").read_text())
    wrong = [row["name"] for row in found["activations"] if not row["ok"]]
    assert wrong[0] == first and wrong[-1] == "logits" and not found["ok"]
    shown = capsys.readouterr().out
    assert f"NOT the same function: {len(wrong)} of 5 activations differ too much, first {first} (by " in shown
    assert [line.split(" ")[1] for line in shown.splitlines() if line.endswith("| NO |")] == wrong


def test_a_head_that_pools_by_the_mean_is_compared_on_the_first_token(directory: Path, without_torch: None) -> None:
    edit(directory, xtransfer_pooling="mean")
    report = comparison.check(directory)
    assert report.ok and report.rows[-1].name == "logits"
    assert any("pools by the mean" in note for note in report.notes)


def test_what_was_recorded_here_is_met_where_pytorch_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    model, file = tiny.checkpoint(tmp_path / "model", layers=2), tmp_path / "kept" / "reference.safetensors"
    live = comparison.check(model, record=file)
    assert live.ok and "computed live by torch" in live.source
    assert any("sentences" in note for note in live.notes) and live.rows[1].shape[1:] == (16,)
    monkeypatch.setattr(reference, "available", lambda: False)
    recorded = comparison.check(model, file)
    assert recorded.rows == live.rows
    inputs = reference.load(file, model).inputs
    lengths = inputs["attention_mask"].sum(-1)
    assert len(lengths) == 13 and lengths.max() == 32 and lengths.min() <= 4  # 32 is all that the model has
    assert inputs["token_type_ids"][-1].any() and not inputs["token_type_ids"][:-1].any()  # the pair
    with pytest.raises(UserError, match="model: nothing to compare with: install torch, or on a machine that has it"):
        comparison.check(model)
    with pytest.raises(UserError, match="--record needs PyTorch, which is not installed"):
        comparison.check(model, record=file)


def test_without_tokenizer_and_head_random_ids_go_through_the_encoder(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    record(CASES["roberta_masked"], tmp_path / "model", seed=2)
    (tmp_path / "model" / reference.FILE).unlink()
    report = comparison.check(tmp_path / "model")
    assert report.ok and [row.name for row in report.rows] == ["embeddings", "layer_1", "layer_2"]
    assert "inputs are random token ids (" in report.notes[1] and "no logits to compare" in report.notes[-1]


def test_no_file_of_another_kind_is_written_over(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"leave out --reference"):
        comparison.check(directory, directory / reference.FILE, directory / "new")
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"model\.safetensors: exists and is no reference"):
        comparison.check(directory, record=directory / "model.safetensors")
    assert (directory / "model.safetensors").read_bytes() == weights


def test_a_stale_reference_is_refused(directory: Path, without_torch: None) -> None:
    config = hf_config.read_config(directory)
    _, params = hf_checkpoint.load_classifier(directory, 3, seed=0)
    params["head"]["bias"].set_value(params["head"]["bias"][...] + 1e-6)
    shutil.rmtree(directory / "..", ignore_errors=True)
    hf_checkpoint.save(directory, config, params)
    with pytest.raises(UserError, match="stale: recorded from other weights"):
        comparison.check(directory, CLASSIFIER / reference.FILE)


def test_random_inputs_stay_inside_the_model() -> None:
    config = dataclasses.replace(CONFIG, pad_id=3, position_offset=4)
    found = activations.random_inputs(config)
    real = found["attention_mask"] == 1
    assert real.sum(-1).tolist() == [1, 2, 3, 5, 8, 13, 16]  # 20 positions, the first four unused
    assert set(found["input_ids"][real].tolist()) == set(range(9)) - {3} and set(found["input_ids"][~real]) == {3}
    assert found["token_type_ids"][3, :6].tolist() == [0, 0, 0, 1, 1, 0]
    batch = activations.batch_of(found, config)
    assert batch["position_ids"][3].tolist() == [4, 5, 6, 7, 8, *[4] * 11] and batch["cls_index"].shape == (7, 1)
    for types in (0, 1):
        assert not activations.random_inputs(dataclasses.replace(config, type_vocab_size=types))["token_type_ids"].any()


def test_a_pad_token_in_a_text_has_the_position_that_roberta_gives_it() -> None:
    ids = (np.asarray([0, 5, 3, 6, 3, 7]), np.zeros(6))
    for family, expected in (("roberta", [4, 5, 3, 6, 3, 7]), ("bert", [4, 5, 6, 7, 8, 9])):
        config = dataclasses.replace(CONFIG, pad_id=3, position_offset=4, family=family)
        assert activations.batch_of(activations.pad([ids], config), config)["position_ids"].tolist() == [expected]


def test_inputs_without_a_pair_where_the_model_has_no_second_type(tmp_path: Path) -> None:
    directory = tiny.checkpoint(tmp_path / "model")
    assert comparison._inputs(directory)[1].endswith("languages and a pair, tokenized by its own tokenizer")
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(said | {"type_vocab_size": 1}))
    inputs, what = comparison._inputs(directory)
    assert len(inputs["input_ids"]) == len(comparison.SENTENCES) and not inputs["token_type_ids"].any()
    assert "tokenized by its own tokenizer, and no pair (" in what and "pairs have 2 token types" in what


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_terminal_of_any_width_shows_every_digit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        activations.Difference("embeddings", (378, 1024), 1.25e-6, 3.5e-8, 12.5, (3, 4)),
        activations.Difference("layer_1", (378, 1024), 2.5e-2, 3.5e-3, 8.25, (7, 8)),
    )
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, soft_wrap=True)
    monkeypatch.setattr(terminal, "console", console)
    binary.show(comparison.Report(Path("some/model"), "computed live", ("a note",), rows))
    table, _, rest = screen.getvalue().partition("a note")
    assert "NOT the same function: 1 of 2 activations differ too much, first layer_1 (by 2.50e-02 at [7, 8]" in rest
    texts = ("embeddings", "378 × 1024", "1.25e-06", "3.50e-08", "12.5", "1.25e-03", "yes")
    texts += ("layer_1", "378 × 1024", "2.50e-02", "3.50e-03", "8.25", "8.25e-04", "NO")
    if width >= 80:
        assert all(text in table for text in texts)
    # In a narrow one cells break, but no character of them is lost.
    title = "Parity of some/model with the reference computed live"
    expected = Counter("".join((title, *binary.HEADER, *texts)).replace(" ", ""))
    assert Counter("".join(table.split()).replace("─", "")) == expected
