"""Exporting a run: transformers loads the result, it is read back bit for bit, and a failure leaves nothing."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from tests.helpers import tiny, tiny_run
from xtransfer import storage
from xtransfer.data.batches.batches import Dataset, eval_batches, make_plan
from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.errors import UserError
from xtransfer.export import __main__ as export
from xtransfer.models.inference import make_eval_step, predict
from xtransfer.runs.classifier import open_classifier, open_run
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import sharding
from xtransfer.train.checkpoints import Checkpoints

# Short texts, one longer than the student's 9 tokens, unknown words, and one from which the tokenizer gets no token.
TEXTS = [
    "good",
    "the film is very good",
    "der Film ist schlecht , arm und übel , sehr übel",
    "le film",
    "ça",
    " ",
    "бой",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return a finished workdir: a teacher with mean pooling, and a vanilla student with BERT's pooling."""
    root = tmp_path_factory.mktemp("root")
    return tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")


@pytest.fixture(scope="module")
def student(workdir, tmp_path_factory):
    """Export the student and return the directory."""
    output = tmp_path_factory.mktemp("exports") / "student"
    export.main(command(workdir, output))
    return output


def command(workdir, output, *flags, objective="vanilla"):
    seed = ["--seed", "0"] if objective != "teacher" else []
    return ["--workdir", str(workdir.root), "--objective", objective, *seed, "--output", str(output), *flags]


def logits(trained, mesh, texts=TEXTS):
    """Return our logits, [n, K]."""
    tokens = tokenize(trained.tokenizer, texts, None, trained.max_length)
    labels, ids = np.full(len(texts), -1, np.int32), tuple(map(str, range(len(texts))))
    architecture = trained.architecture
    offset = {"pad_id": architecture.pad_id, "position_offset": architecture.position_offset}
    plan = make_plan(8, trained.max_length, multiple_of=sharding.data_shards(mesh), **offset)
    batches = eval_batches(Dataset(tokens, labels, None, ids, len(trained.labels)), plan)
    step = make_eval_step(trained.graphdef, mesh)
    return predict(step, trained.params, mesh, batches, len(texts), len(trained.labels))


def arrays(params):
    return {sharding.path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_the_directory_has_only_the_files_that_are_needed(student):
    names = {path.name for path in student.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((student / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["label2id"] == {"bad": 0, "good": 1}
    assert json.loads((student / "tokenizer_config.json").read_text())["model_max_length"] == 9


def test_the_weights_match_the_checkpoint_under_their_original_names(workdir, student):
    written = load_file(student / "model.safetensors")
    with Checkpoints(workdir.student("vanilla", 0) / "checkpoints", read_only=True) as checkpoints:
        saved = checkpoints.restore_arrays(tiny_run.BEST)
    np.testing.assert_array_equal(written["classifier.weight"], saved["head.kernel"].T)
    np.testing.assert_array_equal(written["classifier.bias"], saved["head.bias"])
    np.testing.assert_array_equal(
        written["bert.encoder.layer.0.attention.self.query.weight"], saved["encoder.layers.0.attention.query.kernel"].T
    )
    base = load_file(workdir.root.parent / "student" / "model.safetensors")
    heads = ("cls.", "classifier.")
    assert {name for name in written if not name.startswith(heads)} == {n for n in base if not n.startswith(heads)}
    assert {array.dtype for array in written.values()} == {np.dtype(np.float32)}


def test_transformers_computes_the_same_logits(workdir, student):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    mesh = sharding.make_mesh()
    ours = logits(open_run(workdir, "vanilla", 0, "source_dev", mesh), mesh)
    model = AutoModelForSequenceClassification.from_pretrained(student).eval()
    tokenizer = AutoTokenizer.from_pretrained(student)
    with torch.no_grad():
        theirs = model(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")).logits.numpy()
    assert np.abs(ours).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert model.config.problem_type == "single_label_classification"
    # The model card suggests this call.
    predictions = pipeline("text-classification", model=str(student), truncation=True)(TEXTS)
    assert [entry["label"] for entry in predictions] == [("bad", "good")[i] for i in ours.argmax(-1)]


@pytest.mark.parametrize(("objective", "seed", "selection"), [("vanilla", 0, "last"), ("teacher", None, "source_dev")])
def test_an_export_is_read_back_bit_for_bit(workdir, tmp_path, objective, seed, selection):
    export.main(command(workdir, tmp_path / "out", "--selection", selection, objective=objective))
    mesh = sharding.make_mesh()
    original, exported = open_run(workdir, objective, seed, selection, mesh), open_classifier(tmp_path / "out", mesh)
    before, after = arrays(original.params), arrays(exported.params)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name].view(np.uint32), after[name].view(np.uint32), err_msg=name)
    for attribute in ("labels", "pooling", "max_length", "architecture"):
        assert getattr(original, attribute) == getattr(exported, attribute)
    np.testing.assert_array_equal(logits(original, mesh).view(np.uint32), logits(exported, mesh).view(np.uint32))


def test_a_roberta_is_read_back_bit_for_bit_and_matches_transformers(tmp_path):
    tiny_run.setting(tmp_path)
    base = tiny.roberta(tmp_path / "roberta")
    settings = {"pooling": "cls", "max_length": 9, "steps": tiny_run.STEPS}
    file = tiny.config_file(tmp_path / "roberta.py", tmp_path / "data", tmp_path / "teacher", base, **settings)
    workdir = tiny_run.workdir(
        file, tmp_path / "run", "--config.objectives=('vanilla',)", "--config.teacher.max_length=9"
    )
    export.main(command(workdir, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("roberta", ["RobertaForSequenceClassification"])
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [1, 0, 2]
    mesh = sharding.make_mesh()
    original, exported = open_run(workdir, "vanilla", 0, "source_dev", mesh), open_classifier(tmp_path / "out", mesh)
    assert original.architecture == exported.architecture and exported.architecture.position_offset == 2
    before, after = arrays(original.params), arrays(exported.params)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name].view(np.uint32), after[name].view(np.uint32), err_msg=name)
    texts = [*TEXTS, "the <pad> film <pad> is good"]  # a pad token in a text does not advance the position
    ours = logits(exported, mesh, texts)
    np.testing.assert_array_equal(ours, logits(original, mesh, texts))
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    encoded = AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, truncation=True, return_tensors="pt")
    assert encoded["input_ids"][-1][encoded["attention_mask"][-1] == 1].tolist().count(1) == 2
    with torch.no_grad():
        theirs = model(**encoded).logits.numpy()
    assert np.ptp(ours, axis=0).min() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("program", ["export", "parity"])
def test_ctrl_c_prints_what_is_true_of_the_command(program, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", interrupt)
    monkeypatch.setattr(sys, "argv", [program])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(f"xtransfer.{program}", run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 130
    message = {"export": "the output is complete or does not exist", "parity": "run the command again"}[program]
    assert capsys.readouterr().err == f"interrupted: {message}\n"


def test_the_tokenizer_matches_the_base_checkpoint(workdir, student):
    base, exported = load_tokenizer(workdir.root.parent / "student"), load_tokenizer(student)
    assert base(TEXTS)["input_ids"] == exported(TEXTS)["input_ids"]


def test_mean_pooling_prints_a_warning(workdir, tmp_path, capsys):
    export.main(command(workdir, tmp_path / "teacher", objective="teacher"))
    assert "warning: this classifier pools by mean, which transformers does not support" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "teacher" / "README.md")
    assert "**Not for `transformers`.**" in card.text and card.data.library_name == "xtransfer"
    export.main(command(workdir, tmp_path / "student"))
    assert "warning" not in capsys.readouterr().out


def test_the_card_shows_the_available_results(workdir, student, tmp_path):
    assert "Results\n\nNone: this checkpoint had not been evaluated" in (student / "README.md").read_text()
    copy = Workdir(shutil.copytree(workdir.root, tmp_path / "run"))
    storage.write_jsonl(copy.results, tiny_run.rows(copy, "vanilla", 0, {"en": 0.875, "de": 0.75}))
    export.main(command(copy, tmp_path / "out"))
    assert "| de | test | 75.0 | 62.5 | 50.0 | 200 |" in (tmp_path / "out" / "README.md").read_text()


def test_no_file_contains_a_local_path(workdir, student):
    for path in student.iterdir():
        if path.suffix != ".safetensors":
            assert str(workdir.root.parent) not in path.read_text(), path.name


def test_an_existing_output_is_refused_before_anything_else(tmp_path):
    (tmp_path / "existing").mkdir()
    (tmp_path / "existing" / "file").write_text("content")
    nowhere = Workdir(tmp_path / "nowhere")
    for output in ("existing", "existing/file"):
        with pytest.raises(UserError, match=f"{output} already exists; choose a new directory"):
            export.main(command(nowhere, tmp_path / output))
    assert (tmp_path / "existing" / "file").read_text() == "content"
    with pytest.raises(UserError, match=r"nowhere: no config\.json, so no experiment has been started"):
        export.main(command(nowhere, tmp_path / "out"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_export_leaves_nothing_behind(workdir, tmp_path, monkeypatch, error):
    def failing(self, directory, *args, **kwargs):
        assert (Path(directory) / "model.safetensors").exists()
        raise error

    tokenizer = load_tokenizer(workdir.root.parent / "student")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", failing)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export.main(command(workdir, tmp_path / "parent" / "out"))
    assert list((tmp_path / "parent").iterdir()) == []


def test_broken_results_stop_the_export_before_anything_is_written(workdir, tmp_path):
    copy = Workdir(shutil.copytree(workdir.root, tmp_path / "run"))
    copy.results.write_text("{}\n")
    with pytest.raises(UserError, match=r"results\.jsonl:1: expected an object with the keys"):
        export.main(command(copy, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_command_line_mistake_prints_one_line_and_exits_with_2(workdir, tmp_path):
    arguments = [sys.executable, "-m", "xtransfer.export", *command(workdir, tmp_path / "out", objective="vanila")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {workdir.root}: no run of 'vanila'; did you mean 'vanilla'?; runs: teacher, students/vanilla/seed-0\n"
    )
    assert not (tmp_path / "out").exists()
