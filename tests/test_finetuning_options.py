"""Options of fine-tuning through a whole experiment: students with LoRA or an average, and what reads them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import config as configs
from xtransfer import experiment, storage
from xtransfer.config import ExperimentConfig, LoraConfig, ModelConfig
from xtransfer.errors import UserError
from xtransfer.export.model_card import _options
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs import sharing, sweep
from xtransfer.runs.classifier import open_run
from xtransfer.runs.workdir import TEACHER, Workdir, as_record, check_config_unchanged, record
from xtransfer.runtime.sharding import make_mesh
from xtransfer.train import metrics_log

NEW_KEYS = ("epochs", "schedule", "layer_decay", "reinit_layers", "adam_b1", "adam_b2", "adam_eps", "ema_decay", "lora")
LORA = ("lora.rank=2", "lora.targets=('kernel',)")
AVERAGE = ("ema_decay=0.9", "schedule=cosine", "layer_decay=0.8", "average_last=2")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiment")
    checkpoints = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2)
    return tiny.config_file(root / "tiny.py", tiny.write_task(root / "data"), *checkpoints, steps=8, evaluations=2)


def flags(config_file: Path, *student: str) -> list[str]:
    cache = f"--config.task.cache_dir={config_file.parent / 'cache'}"
    objectives = "--config.objectives=('vanilla','self_training')"
    return [cache, objectives, "--config.teacher.steps=4", *(f"--config.student.{flag}" for flag in student)]


@pytest.mark.parametrize("options", [(*LORA, *AVERAGE), AVERAGE])
def test_an_experiment_predicts_exports_and_repeats_nothing(
    config_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """The checkpoints are plain classifiers. Self-training labels with the merged and averaged vanilla student."""
    config: ExperimentConfig = configs.load(str(config_file), flags(config_file, *options))
    experiment.run(config, tmp_path / "w")
    workdir, mesh = Workdir(tmp_path / "w"), make_mesh()
    results = workdir.results.read_bytes()
    experiment.run(config, tmp_path / "w")
    assert workdir.results.read_bytes() == results
    assert len(list(workdir.logits.iterdir())) == 1
    classifier = open_run(workdir, "self_training", 0, "source_dev", mesh)
    last = metrics_log.read_metrics(workdir.student("self_training", 0))[-1]
    assert last[metrics_log.AVERAGED] == 2
    output = tmp_path / "exported"
    hf_checkpoint.save(output, classifier.architecture, classifier.params, labels=classifier.labels, pooling="mean")
    _, loaded = hf_checkpoint.load_classifier(output, 2, seed=0, pooling="mean", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, classifier.params)


def test_a_sweep_over_a_students_option_trains_the_teacher_once(config_file: Path) -> None:
    points = sweep.parse(str(config_file), flags(config_file, "lora.alpha=16"), ["student.lora.rank=0,2"])
    ours, theirs = (sharing.settings_of(point.config, TEACHER) for point in points)
    assert ours == theirs
    ours, theirs = (sharing.settings_of(point.config, "vanilla") for point in points)
    assert ours.keys() == theirs.keys()
    assert {key for key in ours if ours[key] != theirs[key]} == {"student.lora.rank"}


@pytest.mark.parametrize("key", NEW_KEYS)
def test_an_older_workdir_resumes_with_the_default_and_with_nothing_else(tmp_path: Path, key: str) -> None:
    old: dict[str, Any] = as_record(ExperimentConfig())
    for role in ("teacher", "student"):
        del old[role][key]
    record(Workdir(tmp_path).config, old)
    check_config_unchanged(Workdir(tmp_path), ExperimentConfig())
    other: dict[str, Any] = {"schedule": "cosine", "lora": LoraConfig(rank=2), "reinit_layers": 1}
    changed = ExperimentConfig(student=ModelConfig(**{key: other.get(key, 0.5)}))
    with pytest.raises(UserError, match=rf"student\.{key}.*: .* → "):
        check_config_unchanged(Workdir(tmp_path), changed)
    assert storage.read_object(Workdir(tmp_path).config, "")["student"].keys().isdisjoint({key})


def test_the_model_card_names_the_options() -> None:
    assert _options(ModelConfig()) == ""
    settings = ModelConfig(
        schedule="cosine", adam_b2=0.98, layer_decay=0.5, ema_decay=0.9, lora=LoraConfig(rank=4, targets=("query",))
    )
    assert _options(settings) == (
        "; schedule: cosine; b1 0.9, b2 0.98, eps 1e-08; multiplied by 0.5 per layer from the head down; the weights "
        "are a moving average with a decay of 0.9; LoRA of rank 4 and alpha 16 on `query`, merged"
    )
