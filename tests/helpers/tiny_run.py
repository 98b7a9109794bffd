"""A workdir that looks like a finished experiment, made without training: random weights and made-up scores."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tests.helpers import tiny
from xtransfer import config as settings
from xtransfer import storage
from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.data.registry import load_task
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs import workdir as workdirs
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import sharding
from xtransfer.train import state
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.finetuning import Models

SCORES = {2: 0.75, 6: 0.5}  # step -> accuracy on the source dev split: 2 is the best, 6 the last
BEST, STEPS = min(SCORES), max(SCORES)


def setting(root: Path) -> Path:
    """Write the data, two base checkpoints, and the config file of an experiment; return the config file."""
    data = tiny.write_task(root / "data", train=24, other=8)
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    return tiny.config_file(root / "tiny.py", data, teacher, student, pooling="cls", max_length=9, steps=STEPS)


def workdir(config_file: Path, root: Path, *flags: str) -> Workdir:
    """Create the workdir of a config's experiment, with checkpoints and records of all its runs."""
    experiment: ExperimentConfig = settings.load(str(config_file), [f"--config.teacher.steps={STEPS}", *flags])
    result, task = Workdir(root), load_task(experiment.task)
    workdirs.record(result.config, workdirs.as_record(experiment))
    workdirs.record(result.task, Models(experiment, task).facts())
    run(result.teacher, experiment.teacher, task.labels, seed=experiment.teacher_seed)
    for objective in experiment.objectives:
        for seed in experiment.seeds:
            run(result.student(objective, seed), experiment.student, task.labels, seed=seed)
    return result


def run(directory: Path, model: ModelConfig, labels: tuple[str, ...], *, seed: int) -> None:
    """Write one run's checkpoints and metrics.jsonl. The weights differ from step to step."""
    base, mesh = hf_checkpoint.resolve(model.checkpoint), sharding.make_mesh()
    with Checkpoints(directory / "checkpoints") as checkpoints:
        for step, score in SCORES.items():
            _, params = hf_checkpoint.load_classifier(
                base, len(labels), seed=1000 * seed + step, pooling=model.pooling, mesh=mesh
            )
            counter = {"count": jnp.asarray(step, jnp.int32)}
            checkpoints.save(state.TrainState(np.int32(step), params, counter), score=score)
    for step, score in SCORES.items():
        storage.append_jsonl(directory / "metrics.jsonl", {"step": step, "loss": 0.5, "dev_accuracy": score})


def rows(workdir: Workdir, objective: str, seed: int, values: dict[str, float], **changes: object) -> list[dict]:
    """Return result rows for `values` (language -> accuracy), for both protocols and the step that each selects."""
    task = json.loads(workdir.task.read_text())["name"]
    result_rows = []
    for selection, step in (("source_dev", BEST), ("last", STEPS)):
        for language, value in values.items():
            row = {"task": task, "objective": objective, "draw": "default", "seed": seed, "step": step}
            row |= {
                "selection": selection,
                "split": "test",
                "language": language,
                "metric": "accuracy",
                "value": value,
                "count": 200,
            }
            result_rows.append(row | changes)
            result_rows.append(row | {"metric": "macro_f1", "value": value - 0.125} | changes)
            result_rows.append(row | {"metric": "majority_share", "value": 0.5} | changes)
    return result_rows
