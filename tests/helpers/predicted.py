"""A workdir with the predictions of students that are right on chosen items, made without a model."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from xtransfer import storage
from xtransfer.config import ExperimentConfig, TaskConfig
from xtransfer.runs.workdir import TaskRecord, Workdir

STEP = 40
LABELS = ("bad", "good")

Right = Mapping[str, Mapping[int, Mapping[str, Sequence[int]]]]
"""Whether each item is classified correctly, by objective, seed, and language; the first language is the source."""


def workdir(root: Path, right: Right, **task: object) -> Workdir:
    """Write the config, the task record, the results, and the predictions of an experiment."""
    result = Workdir(root)
    config = dataclasses.replace(ExperimentConfig(), task=TaskConfig(**task))
    languages = list(next(iter(next(iter(right.values())).values())))
    record = TaskRecord(config.task.name, LABELS, False, languages[0], tuple(languages[1:]), "abc", "def")
    storage.write_atomically(result.config, json.dumps(dataclasses.asdict(config)))
    storage.write_atomically(result.task, json.dumps(dataclasses.asdict(record)))
    rows = []
    for objective, by_seed in right.items():
        for seed, by_language in by_seed.items():
            for language, values in by_language.items():
                path = result.predictions(result.student(objective, seed), STEP, "test", language)
                prefix = f"{config.task.name}/test/{language}"
                storage.write_jsonl(path, [prediction(f"{prefix}/{i}", i, value) for i, value in enumerate(values)])
                row = {"task": config.task.name, "objective": objective, "seed": seed, "step": STEP}
                row |= {"selection": "source_dev", "split": "test", "language": language, "metric": "accuracy"}
                rows.append(row | {"value": sum(values) / len(values), "count": len(values)})
    storage.write_jsonl(result.results, rows)
    return result


def prediction(name: str, index: int, is_right: int) -> dict[str, object]:
    """Return a line of a predictions file; labels alternate."""
    label = LABELS[index % 2]
    return {
        "id": name,
        "label": label,
        "prediction": label if is_right else LABELS[1 - index % 2],
        "logits": [0.0, 1.0],
    }
