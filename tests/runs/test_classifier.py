"""Opening trained classifiers: runs in a workdir, and Hugging Face directories."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.helpers import tiny_run
from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.errors import UserError
from xtransfer.models.heads import Classifier
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.weights import WeightSource
from xtransfer.runs.classifier import TrainedClassifier, open_classifier, open_run
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import sharding
from xtransfer.train.checkpoints import Checkpoints

LABELS = ("bad", "good")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a directory with two tiny base checkpoints, `teacher` and `student`, and the workdir `run`."""
    root = tmp_path_factory.mktemp("root")
    tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")
    return root


@pytest.fixture(scope="module")
def run(root):
    """Return a finished workdir with a teacher and one vanilla student."""
    return root / "run"


@pytest.fixture
def copy(run, tmp_path):
    """Return a copy of the workdir that a test may damage."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def classifier(root):
    """Write a Hugging Face classifier with a head and label names."""
    return write_classifier(root / "classifier", root / "student", labels=("no", "perhaps", "yes"))


def write_classifier(directory, base, *, labels, seed=5, **options):
    config = hf_config.read_config(base)
    params = nnx.state(Classifier(config, len(labels), rngs=nnx.Rngs(seed)), nnx.Param)
    hf_checkpoint.save(directory, config, params, tokenizer=load_tokenizer(base), labels=labels, **options)
    return directory


def update_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def arrays(params):
    return {sharding.path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(
    ("objective", "base", "pooling", "length"), [("teacher", "teacher", "mean", 12), ("vanilla", "student", "cls", 9)]
)
@pytest.mark.parametrize("selection", ["source_dev", "last"])
def test_a_run_is_opened_by_its_directory(run, root, mesh, objective, base, pooling, length, selection):
    directory = run / ("teacher" if objective == "teacher" else "students/vanilla/seed-0")
    opened = open_classifier(directory, mesh, selection=selection)
    assert (opened.source, opened.directory) == (directory, root / base)
    assert (opened.labels, opened.pooling, opened.max_length, opened.dtype) == (LABELS, pooling, length, "float32")
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        expected = checkpoints.restore_arrays(tiny_run.BEST if selection == "source_dev" else tiny_run.STEPS)
    actual = arrays(opened.params)
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name in actual:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_the_parameters_are_placed_on_the_mesh(run, classifier):
    mesh = sharding.make_mesh((1, 4, 2))
    for directory in (run / "teacher", classifier):
        params = open_classifier(directory, mesh).params
        kernel = params["encoder"]["layers"][0]["attention"]["query"]["kernel"][...]
        assert kernel.sharding.mesh == mesh and kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")


def test_a_run_is_opened_without_reading_the_base_weights(run, mesh, monkeypatch):
    for method in ("fill", "check"):
        monkeypatch.setattr(WeightSource, method, lambda *_, **__: pytest.fail("pretrained weights were read"))
    assert isinstance(open_run(Workdir(run), "vanilla", 0, "last", mesh), TrainedClassifier)


def test_a_run_is_opened_through_a_link(run, mesh, tmp_path):
    (tmp_path / "best").symlink_to(run / "students" / "vanilla" / "seed-0")
    assert open_classifier(tmp_path / "best", mesh).max_length == 9
    # The students' directory may also be a link, for example to another disk.
    other = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("students"))
    (other / "students").symlink_to(run / "students")
    assert open_classifier(other / "students" / "vanilla" / "seed-0", mesh).max_length == 9


def test_a_run_is_opened_from_inside_its_directory(run, mesh, monkeypatch):
    monkeypatch.chdir(run / "teacher")
    assert open_classifier(Path("."), mesh).max_length == 12


@pytest.mark.parametrize(
    ("directory", "description"),
    [
        (".", "a workdir"),
        ("students", "not a run of the workdir"),
        ("students/vanilla", "not a run of the workdir"),
        ("students/vanilla/seed-0/checkpoints", "not a run of the workdir"),
        ("logits", "not a run of the workdir"),
    ],
)
def test_another_directory_in_a_workdir_is_refused_with_a_list_of_runs(copy, mesh, directory, description):
    (copy / directory).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"{description}.*runs: teacher, students/vanilla/seed-0$"):
        open_classifier(copy / directory, mesh)


@pytest.mark.parametrize("selection", ["target_dev", "lst"])
def test_an_unknown_protocol_is_refused(run, mesh, selection):
    with pytest.raises(UserError, match=f"selection '{selection}': one of source_dev, last"):
        open_classifier(run / "teacher", mesh, selection=selection)


def test_an_unfinished_run_is_refused(copy, mesh):
    metrics = copy / "students" / "vanilla" / "seed-0" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"seed-0: this run is not finished \(it needs step "):
        open_classifier(metrics.parent, mesh)


def test_a_changed_base_checkpoint_is_refused(copy, root, mesh, tmp_path):
    base = shutil.copytree(root / "student", tmp_path / "student")
    config = json.loads((copy / "config.json").read_text())
    config["student"]["checkpoint"] = str(base)
    (copy / "config.json").write_text(json.dumps(config))
    assert open_classifier(copy / "students" / "vanilla" / "seed-0", mesh).directory == base
    tensors = load_file(base / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{base}: no longer the checkpoint that .* restore the old files"):
        open_classifier(copy / "students" / "vanilla" / "seed-0", mesh)


def test_a_hugging_face_classifier_is_opened(classifier, mesh):
    opened = open_classifier(classifier, mesh)
    assert (opened.source, opened.directory, opened.pooling) == (classifier, classifier, "cls")
    assert (opened.labels, opened.max_length, opened.dtype) == (("no", "perhaps", "yes"), 32, "float32")
    expected = load_file(classifier / "model.safetensors")
    np.testing.assert_array_equal(np.asarray(opened.params["head"]["kernel"][...]), expected["classifier.weight"].T)
    tokens = tokenize(opened.tokenizer, ["the film is good"], None, opened.max_length)
    assert len(tokens.input_ids) == 6
    model = nnx.merge(opened.graphdef, opened.params)
    ids = tokens.input_ids[None]
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "position_ids": np.arange(6, dtype=np.int32)[None]}
    batch |= {"token_type_ids": np.zeros_like(ids), "cls_index": np.zeros((1, 1), np.int32)}
    assert model(batch).shape == (1, 1, 3)


def test_a_classifier_inside_a_workdir_is_opened(copy, classifier, mesh):
    inside = shutil.copytree(classifier, copy / "exported" / "model")
    assert open_classifier(inside, mesh).labels == ("no", "perhaps", "yes")


def test_a_classifier_without_label_names_gets_default_names(classifier, mesh, tmp_path):
    directory = shutil.copytree(classifier, tmp_path / "model")
    values = json.loads((directory / "config.json").read_text())
    del values["id2label"], values["label2id"]
    (directory / "config.json").write_text(json.dumps(values))
    assert open_classifier(directory, mesh).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_mean_pooling_is_read_from_the_directory(root, mesh, tmp_path):
    directory = write_classifier(tmp_path / "model", root / "student", labels=LABELS, pooling="mean")
    assert open_classifier(directory, mesh).pooling == "mean"


@pytest.mark.parametrize(("limit", "expected"), [(20, 20), (1000, 32), (int(1e30), 32)])
def test_the_tokenizers_length_limit_is_respected(classifier, mesh, tmp_path, limit, expected):
    directory = shutil.copytree(classifier, tmp_path / "model")
    update_json(directory / "tokenizer_config.json", model_max_length=limit)
    assert open_classifier(directory, mesh).max_length == expected


def test_an_encoder_without_a_head_is_refused(root, mesh):
    with pytest.raises(UserError, match="no trained classification head, so it cannot predict"):
        open_classifier(root / "student", mesh)


@pytest.mark.parametrize("kind", ["regression", "extractive_qa"])
def test_another_problem_type_is_refused(classifier, mesh, tmp_path, kind):
    directory = shutil.copytree(classifier, tmp_path / "model")
    update_json(directory / "config.json", problem_type=kind)
    with pytest.raises(UserError, match=f"problem_type is '{kind}'"):
        open_classifier(directory, mesh)


def test_a_head_with_one_output_is_refused(root, mesh, tmp_path):
    directory = write_classifier(tmp_path / "model", root / "student", labels=("score",))
    with pytest.raises(UserError, match=r"classifier\.weight has shape \[1, 8\]: fewer than two classes"):
        open_classifier(directory, mesh)


def test_an_adapter_is_refused(mesh, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"^{tmp_path}: a PEFT adapter"):
        open_classifier(tmp_path, mesh)


@pytest.mark.parametrize("value", [16.0, "16"])
def test_the_max_length_of_a_tokenizer_may_be_a_float_or_text(root, mesh, tmp_path, value):
    directory = write_classifier(tmp_path / "model", root / "student", labels=("bad", "good"))
    assert open_classifier(directory, mesh).max_length > 16
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": value}))
    max_length = open_classifier(directory, mesh).max_length
    assert type(max_length) is int and max_length == 16


def test_a_path_without_a_classifier_is_refused(mesh, tmp_path):
    with pytest.raises(UserError, match=r"neither a run of a workdir nor a Hugging Face directory"):
        open_classifier(tmp_path, mesh)
    with pytest.raises(UserError, match=r"there/is/none: not a directory, a hub id"):
        open_classifier(Path("there/is/none"), mesh)
