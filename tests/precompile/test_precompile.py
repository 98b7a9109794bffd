"""Compiling ahead of time: steps and batches equal a run's, and the reports and errors are clear."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from tests.helpers import tiny_run
from xtransfer import config as settings
from xtransfer.config import ExperimentConfig
from xtransfer.data.batches.batches import TrainBatches, eval_batches
from xtransfer.data.registry import load_task
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.models.inference import INPUTS
from xtransfer.precompile import __main__ as precompile
from xtransfer.precompile import topology
from xtransfer.precompile.compilation import compile_and_measure
from xtransfer.precompile.steps import STEPS, Override, Step, steps
from xtransfer.precompile.topology import Chip
from xtransfer.runtime.sharding import make_mesh, place_batch
from xtransfer.train.finetuning import Models
from xtransfer.train.schedules import learning_rates

ROOT = Path(__file__).parents[2]
CHIP = Chip(memory=1.0, clock=2.0, flops_per_cycle=1000)
REPORT_KEYS = {"step", "rows_per_chip", "row_length", "hbm_gib", "fits", "estimated_mcycles", "matmul_limit_mcycles"}
NO_OVERRIDE = Override()
FLAGS = ["--config.task.labelled=8", "--config.evaluation_batch_size=40"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.setting(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def config(file: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    cache = tmp_path_factory.mktemp("cache")
    return settings.load(str(file), [*FLAGS, f"--config.task.cache_dir={cache}"])


def step(config: ExperimentConfig, name: str, override: Override = NO_OVERRIDE, mesh: Any = None) -> Step:
    """Return one step of an experiment."""
    (built,) = steps(config, mesh or make_mesh(), override, [name])
    return built


def with_student(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    """Return the config with changes to the student."""
    return dataclasses.replace(config, student=dataclasses.replace(config.student, **changes))


def lowered(function: Any, *arguments: Any) -> str:
    return function.lower(*arguments).as_text()


@pytest.mark.parametrize("packed", [True, False])
def test_steps_and_batches_are_those_of_a_run(config: ExperimentConfig, packed: bool) -> None:
    """The step lowers to the same program as in a run, and its batch has the shapes of a real batch."""
    config = with_student(config, packed=packed)
    task = load_task(config.task)
    model = Models(config, task).student
    examples = task.load("train", "en")[:8]
    dataset = model.dataset(examples)
    batches = TrainBatches(dataset, model.inputs.training_plan(len(dataset)), 0)
    train = step(config, "student_train")
    train_batch = train.arguments[1]
    real_batch = place_batch(model.mesh, batches(0))
    assert train.row_sizes[-1] == batches.row_sizes[-1] == 8
    if real_batch["input_ids"].shape[0] == train.row_sizes[-1]:
        assert {key: (x.shape, x.dtype) for key, x in real_batch.items()} == {
            key: (x.shape, x.dtype) for key, x in train_batch.items()
        }
    objective = OBJECTIVES["monox_kd"]  # the first in the config that has a teacher
    expected = lowered(
        model.compiled_steps.train_step(objective),
        model.compiled_steps.abstract_state,
        train_batch,
        jax.random.key(3),
        learning_rates(model.settings)[0],
    )
    assert lowered(train.function, *train.arguments) == expected

    evaluation = step(config, "evaluation")
    evaluation_batch = evaluation.arguments[1]
    real_batches = [batch for _, batch in eval_batches(dataset, model.inputs.evaluation_plan(8))]
    full_batch = max(real_batches, key=lambda batch: len(batch["label"]))
    assert set(evaluation_batch) == set(INPUTS)
    assert {key: x.shape[1:] for key, x in evaluation_batch.items()} == {
        key: full_batch[key].shape[1:] for key in INPUTS
    }
    expected = lowered(model.compiled_steps.eval_step, model.compiled_steps.abstract_params(), evaluation_batch)
    assert lowered(evaluation.function, *evaluation.arguments) == expected


def test_largest_row_count_is_compiled(config: ExperimentConfig) -> None:
    """About four texts of 6 to 8 tokens fit into a row of 32, so a batch of 16 texts has from a few to 16 rows."""
    config = with_student(config, batch_size=16, row_length=32)
    train = step(config, "student_train", mesh=make_mesh((2, 1, 1), jax.devices()[:2]))
    assert len(train.row_sizes) > 1 and sorted(train.row_sizes) == list(train.row_sizes)
    assert train.row_sizes[-1] == 16 and train.arguments[1]["input_ids"].shape == (16, 32)


def test_inference_uses_full_and_quarter_batches(config: ExperimentConfig) -> None:
    labelling = step(config, "labelling", mesh=make_mesh((2, 1, 1), jax.devices()[:2]))
    assert labelling.row_sizes == (10, 40) and labelling.arguments[1]["input_ids"].shape == (40, 12)


@pytest.mark.parametrize("name", STEPS)
def test_overridden_batch_shape(config: ExperimentConfig, name: str) -> None:
    """There are six rows on each of 2 × 2 shards, whatever `tensor` is, and a slot for every eight tokens."""
    mesh = make_mesh((2, 2, 2))
    packed = step(config, name, Override(rows=6, row_length=16), mesh)
    assert packed.row_sizes == (24,) and packed.arguments[1]["input_ids"].shape == (24, 16)
    assert packed.arguments[1]["cls_index"].shape == (24, 2)
    unpacked = step(config, name, Override(rows=6, unpacked=True), mesh)
    assert unpacked.arguments[1]["cls_index"].shape == (24, 1)


def test_overridden_batches_need_no_data_tokenizer_or_weights(tmp_path: Path) -> None:
    shutil.copy(tiny_config(tmp_path) / "config.json", tmp_path / "config.json")
    flags = [f"--config.{role}.checkpoint={tmp_path}" for role in ("teacher", "student")]
    config = settings.load(str(ROOT / "configs/tpu_shapes.py"), flags)
    for override in (Override(rows=2), Override(unpacked=True)):
        assert len(list(steps(config, make_mesh(), override))) == 4
    with pytest.raises(
        UserError, match=r"no tokenizer files.*\(to compile without data and tokenizer, pass --rows-per-chip"
    ):
        step(config, "teacher_train")


def tiny_config(directory: Path) -> Path:
    """Write a directory with nothing but the config of a tiny BERT."""
    (directory / "shape").mkdir()
    shape = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
    (directory / "shape" / "config.json").write_text(json.dumps(shape))
    return directory / "shape"


def test_hub_id_needs_only_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c" * 40
    cached = tmp_path / "hub" / "models--someone--some-bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(tiny_config(tmp_path) / "config.json", cached / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = settings.load(str(ROOT / "configs/tpu_shapes.py"), ["--config.student.checkpoint=someone/some-bert"])
    assert step(config, "evaluation", Override(rows=1)).row_sizes == (8,)
    config = settings.load(str(ROOT / "configs/tpu_shapes.py"), ["--config.student.checkpoint=someone/other"])
    with pytest.raises(UserError, match="someone/other: no such directory, and not available from the hub: HF_HUB_OFF"):
        step(config, "evaluation", Override(rows=1))


def test_student_steps_do_not_read_the_teacher(config: ExperimentConfig) -> None:
    config = dataclasses.replace(config, teacher=settings.TeacherConfig(checkpoint="/nowhere"))
    assert len(list(steps(config, make_mesh(), Override(rows=1), ["student_train", "evaluation"]))) == 2
    with pytest.raises(UserError, match="/nowhere"):
        step(config, "labelling", Override(rows=1))


def test_report_of_a_step(config: ExperimentConfig) -> None:
    """The model is one BERT layer of width 8, feed-forward 16. There are 3 rows of 12 tokens on each of 4 shards."""
    mesh = make_mesh((4, 1, 2))
    report = compile_and_measure(step(config, "student_train", Override(rows=3, row_length=12), mesh), CHIP, mesh)
    parameters = 8 * 8 + 8 * 8  # keys and values: the only layer computes nothing else for every token
    assert report["matmul_limit_mcycles"] == pytest.approx(6 * parameters * 4 * 3 * 12 / 8 / 1000 / 1e6)
    assert REPORT_KEYS | {"collective_bytes"} < set(report)
    assert (report["step"], report["rows_per_chip"], report["row_length"]) == ("student_train", 3, 12)
    assert report["fits"] is True
    assert report["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2}
    assert (report["batch_shapes"], report["row_sizes"]) == (1, [12])
    assert report["estimated_mcycles"] == 0.0  # the CPU's compiler writes no estimates
    assert report["collective_bytes"]["all-reduce"] > 0
    sizes = [report[f"{key}_gib"] for key in ("arguments", "temporaries", "outputs", "code")]
    assert report["hbm_gib"] == pytest.approx(sum(sizes)) and report["arguments_gib"] > 0
    evaluation = compile_and_measure(step(config, "evaluation", Override(rows=3, row_length=12)), CHIP, make_mesh())
    assert evaluation["matmul_limit_mcycles"] == pytest.approx(2 * parameters * 3 * 12 / 1000 / 1e6)
    small_chip = dataclasses.replace(CHIP, memory=1e-6)
    assert not compile_and_measure(step(config, "evaluation", Override(rows=3)), small_chip, make_mesh())["fits"]


def test_matmul_limit_of_multilingual_bert() -> None:
    """Each layer has 7.078 M parameters in matrices, the last one 1.180 M for every token: 79.04 M in all.

    A chip does 131,072 operations per cycle.
    """
    config = settings.load(str(ROOT / "configs/tpu_shapes.py:mbert"))
    train = step(config, "student_train", Override(rows=32, row_length=128, unpacked=True))
    assert train.flops / 8 / topology.CHIPS["v5e"].flops_per_cycle / 1e6 == pytest.approx(14.82, abs=0.005)


def test_program_that_jax_cannot_read_still_has_its_memory_reported(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens with a libtpu that is newer than JAX."""

    def unreadable(self: Any) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    report = compile_and_measure(step(config, "evaluation", Override(rows=1)), CHIP, make_mesh())
    assert report["fits"] and report["hbm_gib"] > 0 and report["estimated_mcycles"] is None
    text = "\n".join(precompile.lines(report, CHIP))
    assert "1 GiB: fits" in text and "no cycles and no collectives" in text and "pip install 'jax[tpu]==" in text


class FailingStep:
    """A jitted function that fails to compile."""

    def __init__(self, message: str):
        self.message = message

    def lower(self, *_: Any) -> Any:
        return self

    def compile(self) -> Any:
        raise jax.errors.JaxRuntimeError(self.message)


def test_out_of_memory_while_compiling_is_reported_and_no_error() -> None:
    failing = FailingStep("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.")
    too_large = Step("student_train", failing, (), (8,), 128, 1, 1)
    report = compile_and_measure(too_large, CHIP, make_mesh())
    assert (report["fits"], report["hbm_gib"], report["estimated_mcycles"]) == (False, 20.5, None)
    text = "\n".join(precompile.lines(report, CHIP))
    assert "does not fit: 20.50 GiB of 1 GiB" in text and "20.50G of 15.75G" in text
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_and_measure(
            dataclasses.replace(too_large, function=FailingStep("INTERNAL: a defect")), CHIP, make_mesh()
        )


@pytest.mark.parametrize(("memory", "fits"), [(16, True), (1e-6, False)])
def test_json_is_written_before_the_error_for_steps_that_do_not_fit(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    memory: float,
    fits: bool,
) -> None:
    """The CPU's devices serve as chips. Two steps are compiled, in the order of a run."""
    monkeypatch.setattr(precompile, "devices_of", lambda name: jax.devices())
    monkeypatch.setattr(precompile, "chip_of", lambda name: dataclasses.replace(CHIP, memory=memory))
    path = tmp_path / "new" / "report.json"
    flags = ["--topology", "v5e:2x4", "--json", str(path), "--rows-per-chip", "1", "--steps", "evaluation,labelling"]
    command = ["--config", str(file), *flags, "--config.mesh.fsdp=2"]
    if fits:
        precompile.main(command)
    else:
        with pytest.raises(
            UserError, match="^labelling, evaluation: more than the 1e-06 GiB of a chip; lower batch_size"
        ):
            precompile.main(command)
    report = json.loads(path.read_text())
    assert (report["topology"], report["chips"]) == ("v5e:2x4", 8)
    assert [(entry["step"], entry["fits"]) for entry in report["steps"]] == [("labelling", fits), ("evaluation", fits)]
    assert report["steps"][0]["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    output = capsys.readouterr().out
    assert "8 chips" in output and "mesh data 4 × fsdp 2 × tensor 1" in output and "labelling: compiling" in output
    assert "evaluation: 1 rows of 9 tokens per chip (batches of 8 rows: 1 shape)" in output
    assert ("does not fit" in output) != fits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5x:2x4"], r"--topology v5x:2x4: no such chip; choose one like v5e:2x4"),
        (["--topology", "v5e"], r"--topology v5e: its shape is missing or malformed; choose one like v5e:2x4"),
        (["--topology", "v5e:2x4", "--steps", "student"], r"--steps student: no such step.*teacher_train, labelling"),
        (["--topology", "v5e:2x4", "--config.studnt.steps=3"], r"studnt.*did you mean 'student'"),
    ],
)
def test_wrong_flags(file: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        precompile.main(["--config", str(file), *flags])


def test_microbatches_are_reported(config: ExperimentConfig) -> None:
    train = step(with_student(config, accumulation=3), "student_train", Override(rows=6, row_length=12))
    report = compile_and_measure(train, CHIP, make_mesh())
    assert report["parts"] == 3
    first_line = next(precompile.lines(report, CHIP))
    assert first_line.startswith("student_train: 6 rows of 12 tokens per chip in 3 microbatches (batches")
    for name in ("student_train", "labelling"):
        assert step(config, name, Override(rows=6)).microbatches == 1


def test_rows_must_be_a_multiple_of_the_microbatches(config: ExperimentConfig) -> None:
    with pytest.raises(UserError, match=r"--rows-per-chip 6 is not a multiple of student\.accumulation=4"):
        step(with_student(config, accumulation=4), "student_train", Override(rows=6))
    with pytest.raises(UserError, match=r"--row-length 8 is below student\.max_length; also pass --rows-per-chip"):
        step(config, "student_train", Override(row_length=8))


@pytest.mark.parametrize("flag", ["--rows-per-chip", "--row-length"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1048577", "100000000000"])
def test_counts_out_of_range(flag: str, value: str, file: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        precompile.main(["--config", str(file), "--topology", "v5e:2x4", f"{flag}={value}"])
    assert stopped.value.code == 2 and "is not a whole number from 1 to 1,048,576" in capsys.readouterr().err


def test_more_tokens_than_positions_are_an_error_as_in_a_run(config: ExperimentConfig) -> None:
    with pytest.raises(UserError, match=r"student\.max_length is 1000, but .* has \d+ positions"):
        step(with_student(config, max_length=1000), "student_train", Override(rows=1, unpacked=True))


def test_unwritable_json_fails_before_anything_is_compiled(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompile, "devices_of", lambda name: jax.devices())
    monkeypatch.setattr(precompile, "compile_and_measure", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError, match="cannot be written"):
        precompile.main(["--config", str(file), "--topology", "v5e:2x4", "--json", str(tmp_path)])


def test_missing_libtpu_error_says_how_to_install_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, .* is not installed; run .*jax\[tpu\].*XTRANSFER_EXTRAS=tpu"):
        precompile.main(["--config", str(file), "--topology", "v5e:2x4"])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compilation_for_a_tpu(file: Path, tmp_path: Path) -> None:
    """Run the command itself for a tiny student on eight v5e chips, and then for a topology that does not exist."""
    command = [sys.executable, "-m", "xtransfer.precompile", "--config", str(file)]
    flags = ["--topology", "v5e:2x4", "--steps", "student_train", "--rows-per-chip", "2", "--row-length", "12"]
    path = tmp_path / "report.json"
    done = subprocess.run(
        [*command, *flags, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    report = json.loads(path.read_text())
    (entry,) = report["steps"]
    assert (report["topology"], report["chips"]) == ("v5e:2x4", 8) and set(entry) > REPORT_KEYS
    assert entry["estimated_mcycles"] > 0.01 and entry["fits"] and entry["collective_bytes"]["all-reduce"] > 0
    assert np.isclose(sum(entry["groups"].values()), entry["estimated_mcycles"], rtol=0.5)
    assert "student_train: 2 rows of 12 tokens per chip" in done.stdout
    done = subprocess.run([*command, "--topology", "v5e:3x7"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--topology v5e:3x7: " in done.stderr
