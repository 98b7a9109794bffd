"""Compiling ahead of time: the very steps and batches of a run, what is told of them, and what is refused."""

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
from xtransfer.precompile import measure as measuring
from xtransfer.precompile import topology
from xtransfer.precompile.steps import STEPS, Override, Step, steps
from xtransfer.precompile.topology import Chip
from xtransfer.runtime.sharding import make_mesh, place_batch
from xtransfer.train.finetuning import Models

ROOT = Path(__file__).parents[2]
CHIP = Chip(memory=1.0, clock=2.0, flops_per_cycle=1000)
KEYS = {"step", "rows_per_chip", "row_length", "hbm_gib", "fits", "estimated_mcycles", "matmul_limit_mcycles"}
ASKED_NOTHING = Override()
FLAGS = ["--config.task.labelled=8", "--config.evaluation_batch_size=40"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.setting(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def config(file: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    cache = tmp_path_factory.mktemp("cache")
    return settings.load(str(file), [*FLAGS, f"--config.task.cache_dir={cache}"])


def step(config: ExperimentConfig, name: str, override: Override = ASKED_NOTHING, mesh: Any = None) -> Step:
    (found,) = steps(config, mesh or make_mesh(), override, [name])
    return found


def with_student(config: ExperimentConfig, **changes: Any) -> ExperimentConfig:
    return dataclasses.replace(config, student=dataclasses.replace(config.student, **changes))


def lowered(function: Any, *arguments: Any) -> str:
    return function.lower(*arguments).as_text()


@pytest.mark.parametrize("packed", [True, False])
def test_they_are_the_steps_and_batches_of_a_run(config: ExperimentConfig, packed: bool) -> None:
    """The program is that which a run's own step becomes with a real batch, a real state's shapes and a real key."""
    config = with_student(config, packed=packed)
    task = load_task(config.task)
    model = Models(config, task).student
    examples = task.load("train", "en")[:8]
    dataset = model.dataset(examples)
    batches = TrainBatches(dataset, model.inputs.training_plan, 0)
    found = step(config, "student_train")
    real = place_batch(model.mesh, batches(0))
    assert found.row_sizes[-1] == batches.row_sizes[-1] == 8
    if real["input_ids"].shape[0] == found.row_sizes[-1]:
        assert {key: (x.shape, x.dtype) for key, x in real.items()} == {
            key: (x.shape, x.dtype) for key, x in found.arguments[1].items()
        }
    objective = OBJECTIVES["monox_kd"]  # the first that learns from a teacher
    own = lowered(
        model.compiled_steps.train_step(objective),
        model.compiled_steps.abstract_state,
        found.arguments[1],
        jax.random.key(3),
    )
    assert lowered(found.function, *found.arguments) == own

    inferred = step(config, "evaluation")
    full = max(
        (batch for _, batch in eval_batches(dataset, model.inputs.evaluation_plan(8))), key=lambda b: len(b["label"])
    )
    assert set(inferred.arguments[1]) == set(INPUTS)
    assert {key: x.shape[1:] for key, x in inferred.arguments[1].items()} == {
        key: full[key].shape[1:] for key in INPUTS
    }
    own = lowered(model.compiled_steps.eval_step, model.compiled_steps.abstract_params(), inferred.arguments[1])
    assert lowered(inferred.function, *inferred.arguments) == own


def test_a_run_of_many_row_counts_is_compiled_for_the_largest(config: ExperimentConfig) -> None:
    """Texts of 6 to 8 tokens, four or so in a row of 32: a batch of 16 may take few rows, and never more than 16."""
    config = with_student(config, batch_size=16, row_length=32)
    found = step(config, "student_train", mesh=make_mesh((2, 1, 1), jax.devices()[:2]))
    assert len(found.row_sizes) > 1 and sorted(found.row_sizes) == list(found.row_sizes)
    assert found.row_sizes[-1] == 16 and found.arguments[1]["input_ids"].shape == (16, 32)


def test_evaluation_has_a_full_batch_and_a_quarter_of_one(config: ExperimentConfig) -> None:
    found = step(config, "labelling", mesh=make_mesh((2, 1, 1), jax.devices()[:2]))
    assert found.row_sizes == (10, 40) and found.arguments[1]["input_ids"].shape == (40, 12)


@pytest.mark.parametrize("name", STEPS)
def test_a_batch_that_is_asked_for(config: ExperimentConfig, name: str) -> None:
    """Rows on each of 2 × 2 shards, whatever `tensor` is; a slot for every eight tokens."""
    mesh = make_mesh((2, 2, 2))
    packed = step(config, name, Override(rows=6, row_length=16), mesh)
    assert packed.row_sizes == (24,) and packed.arguments[1]["input_ids"].shape == (24, 16)
    assert packed.arguments[1]["cls_index"].shape == (24, 2)
    unpacked = step(config, name, Override(rows=6, unpacked=True), mesh)
    assert unpacked.arguments[1]["cls_index"].shape == (24, 1)


def test_neither_data_nor_tokenizer_nor_weights_are_needed_then(tmp_path: Path) -> None:
    shutil.copy(tiny_config(tmp_path) / "config.json", tmp_path / "config.json")
    flags = [f"--config.{role}.checkpoint={tmp_path}" for role in ("teacher", "student")]
    config = settings.load(str(ROOT / "configs/tpu_shapes.py"), flags)
    for override in (Override(rows=2), Override(unpacked=True)):
        assert len(list(steps(config, make_mesh(), override))) == 4
    with pytest.raises(UserError, match=r"no tokenizer files.*\(without data and tokenizer, pass --rows-per-chip"):
        step(config, "teacher_train")


def tiny_config(directory: Path) -> Path:
    (directory / "shape").mkdir()
    shape = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}
    (directory / "shape" / "config.json").write_text(json.dumps(shape))
    return directory / "shape"


def test_of_a_hub_id_only_its_config_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_teacher_is_not_looked_at_for_the_students_steps(config: ExperimentConfig) -> None:
    config = dataclasses.replace(config, teacher=settings.ModelConfig(checkpoint="/nowhere"))
    assert len(list(steps(config, make_mesh(), Override(rows=1), ["student_train", "evaluation"]))) == 2
    with pytest.raises(UserError, match="/nowhere"):
        step(config, "labelling", Override(rows=1))


def test_what_is_told_of_a_step(config: ExperimentConfig) -> None:
    """One BERT layer of 8, feed-forward 16; 8 devices: 3 rows of 12 tokens on each of 4 shards."""
    row = measuring.measure(
        step(config, "student_train", Override(rows=3, row_length=12), make_mesh((4, 1, 2))), CHIP, make_mesh((4, 1, 2))
    )
    layer = 4 * (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8) + 4 * 8
    parameters = 2 * 8 + layer + (8 * 8 + 8) + (8 * 2 + 2)  # the embeddings' norm, the layer, pooler, head
    assert row["matmul_limit_mcycles"] == pytest.approx(6 * parameters * 4 * 3 * 12 / 8 / 1000 / 1e6)
    assert KEYS | {"collective_bytes"} < set(row)
    assert (row["step"], row["rows_per_chip"], row["row_length"], row["fits"]) == ("student_train", 3, 12, True)
    assert row["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2} and (row["batch_shapes"], row["row_sizes"]) == (1, [12])
    assert row["estimated_mcycles"] == 0.0  # a CPU's compiler estimates nothing
    assert row["collective_bytes"]["all-reduce"] > 0
    parts = [row[f"{key}_gib"] for key in ("arguments", "temporaries", "outputs", "code")]
    assert row["hbm_gib"] == pytest.approx(sum(parts)) and row["arguments_gib"] > 0
    inferred = measuring.measure(step(config, "evaluation", Override(rows=3, row_length=12)), CHIP, make_mesh())
    assert inferred["matmul_limit_mcycles"] == pytest.approx(2 * parameters * 3 * 12 / 1000 / 1e6)
    small = dataclasses.replace(CHIP, memory=1e-6)
    assert not measuring.measure(step(config, "evaluation", Override(rows=3)), small, make_mesh())["fits"]


def test_multilingual_berts_limit_is_that_of_its_paper_shape() -> None:
    """85.65 M parameters beside the tables; 131,072 operations a cycle."""
    config = settings.load(str(ROOT / "configs/tpu_shapes.py:mbert"))
    found = step(config, "student_train", Override(rows=32, row_length=128, unpacked=True))
    assert found.flops / 8 / topology.CHIPS["v5e"].flops_per_cycle / 1e6 == pytest.approx(16.06, abs=0.005)


def test_a_program_that_jax_cannot_read_still_tells_its_memory(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a libtpu that is newer than JAX."""

    def unreadable(self: Any) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    row = measuring.measure(step(config, "evaluation", Override(rows=1)), CHIP, make_mesh())
    assert row["fits"] and row["hbm_gib"] > 0 and row["estimated_mcycles"] is None
    told = "\n".join(precompile.lines(row, CHIP))
    assert "1 GiB: fits" in told and "no cycles and collectives" in told and "pip install 'jax[tpu]==" in told


class Broken:
    """A step whose compiler gives up."""

    def __init__(self, message: str):
        self.message = message

    def lower(self, *_: Any) -> Any:
        return self

    def compile(self) -> Any:
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_step_that_the_compiler_cannot_fit_is_a_row_and_not_an_error() -> None:
    broken = Step("student_train", Broken("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm."), (), (8,), 128, 1, 1)
    row = measuring.measure(broken, CHIP, make_mesh())
    assert (row["fits"], row["hbm_gib"], row["estimated_mcycles"]) == (False, 20.5, None)
    told = "\n".join(precompile.lines(row, CHIP))
    assert "does not fit: 20.50 GiB of 1 GiB" in told and "20.50G of 15.75G" in told
    with pytest.raises(jax.errors.JaxRuntimeError):
        measuring.measure(dataclasses.replace(broken, function=Broken("INTERNAL: a defect")), CHIP, make_mesh())


@pytest.mark.parametrize(("memory", "fits"), [(16, True), (1e-6, False)])
def test_the_json_is_written_and_what_does_not_fit_is_an_error_after_it(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    memory: float,
    fits: bool,
) -> None:
    """With the CPU's devices for chips, of which two steps are compiled in the order of a run."""
    monkeypatch.setattr(precompile, "devices_of", lambda name: jax.devices())
    monkeypatch.setattr(precompile, "chip_of", lambda name: dataclasses.replace(CHIP, memory=memory))
    path = tmp_path / "new" / "found.json"
    flags = ["--topology", "v5e:2x4", "--json", str(path), "--rows-per-chip", "1", "--steps", "evaluation,labelling"]
    command = ["--config", str(file), *flags, "--config.mesh.fsdp=2"]
    if fits:
        precompile.main(command)
    else:
        with pytest.raises(
            UserError, match="^labelling, evaluation: more than the 1e-06 GiB of a chip: lower batch_size"
        ):
            precompile.main(command)
    found = json.loads(path.read_text())
    assert (found["topology"], found["chips"]) == ("v5e:2x4", 8)
    assert [(row["step"], row["fits"]) for row in found["steps"]] == [("labelling", fits), ("evaluation", fits)]
    assert found["steps"][0]["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    said = capsys.readouterr().out
    assert "8 chips" in said and "mesh data 4 × fsdp 2 × tensor 1" in said and "labelling: compiling" in said
    assert "evaluation: 1 rows of 9 tokens per chip (batches of 8 rows: 1 shape)" in said
    assert ("does not fit" in said) != fits


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology", "v5x:2x4"], r"--topology v5x:2x4: no such chip; choose one like v5e:2x4"),
        (["--topology", "v5e"], r"--topology v5e: its sides are missing, as in v5e:2x4"),
        (["--topology", "v5e:2x4", "--steps", "student"], r"--steps student: no such step.*teacher_train, labelling"),
        (["--topology", "v5e:2x4", "--config.studnt.steps=3"], r"studnt.*did you mean 'student'"),
    ],
)
def test_flags_that_cannot_be(file: Path, flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        precompile.main(["--config", str(file), *flags])


def test_the_parts_of_a_batch_are_told(config: ExperimentConfig) -> None:
    row = measuring.measure(
        step(with_student(config, accumulation=3), "student_train", Override(rows=6, row_length=12)), CHIP, make_mesh()
    )
    assert row["parts"] == 3
    assert next(precompile.lines(row, CHIP)).startswith(
        "student_train: 6 rows of 12 tokens per chip in 3 microbatches (batches"
    )
    assert (
        step(config, "student_train", Override(rows=6)).microbatches
        == step(config, "labelling", Override(rows=6)).microbatches
        == 1
    )


def test_rows_that_an_accumulated_gradient_cannot_share(config: ExperimentConfig) -> None:
    with pytest.raises(UserError, match=r"--rows-per-chip 6 is not a multiple of student\.accumulation 4"):
        step(with_student(config, accumulation=4), "student_train", Override(rows=6))
    with pytest.raises(UserError, match=r"--row-length 8 is below student\.max_length: pass --rows-per-chip too"):
        step(config, "student_train", Override(row_length=8))


@pytest.mark.parametrize("flag", ["--rows-per-chip", "--row-length"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1048577", "100000000000"])
def test_numbers_that_cannot_be(flag: str, value: str, file: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        precompile.main(["--config", str(file), "--topology", "v5e:2x4", f"{flag}={value}"])
    assert stopped.value.code == 2 and "is not a whole number from 1 to 1,048,576" in capsys.readouterr().err


def test_more_tokens_than_positions_are_refused_as_in_a_run(config: ExperimentConfig) -> None:
    with pytest.raises(UserError, match=r"student\.max_length is 1000, but .* has \d+ positions"):
        step(with_student(config, max_length=1000), "student_train", Override(rows=1, unpacked=True))


def test_a_place_that_cannot_be_written_is_found_before_anything_is_compiled(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompile, "devices_of", lambda name: jax.devices())
    monkeypatch.setattr(precompile, "measure", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError, match="cannot be written"):
        precompile.main(["--config", str(file), "--topology", "v5e:2x4", "--json", str(tmp_path)])


def test_without_libtpu_it_says_how_to_get_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, .* is missing.*jax\[tpu\].*XTRANSFER_EXTRAS=tpu"):
        precompile.main(["--config", str(file), "--topology", "v5e:2x4"])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_real_compilation_for_a_tpu(file: Path, tmp_path: Path) -> None:
    """The binary itself: a tiny student on eight v5e chips; then a topology that there is not."""
    command = [sys.executable, "-m", "xtransfer.precompile", "--config", str(file)]
    flags = ["--topology", "v5e:2x4", "--steps", "student_train", "--rows-per-chip", "2", "--row-length", "12"]
    path = tmp_path / "found.json"
    done = subprocess.run(
        [*command, *flags, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(path.read_text())
    (row,) = found["steps"]
    assert (found["topology"], found["chips"]) == ("v5e:2x4", 8) and set(row) > KEYS
    assert row["estimated_mcycles"] > 0.01 and row["fits"] and row["collective_bytes"]["all-reduce"] > 0
    assert np.isclose(sum(row["groups"].values()), row["estimated_mcycles"], rtol=0.5)
    assert "student_train: 2 rows of 12 tokens per chip" in done.stdout
    done = subprocess.run([*command, "--topology", "v5e:3x7"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--topology v5e:3x7: " in done.stderr
