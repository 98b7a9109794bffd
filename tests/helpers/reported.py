"""A workdir with every file that the report reads, made without any model: drawn predictions, and scores of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from xtransfer import storage
from xtransfer.config import ExperimentConfig, TaskConfig
from xtransfer.evaluation import metrics
from xtransfer.evaluation.token_counts import TokenCounts
from xtransfer.runs.costs import Cost
from xtransfer.runs.selection import PROTOCOLS, weights_name
from xtransfer.runs.starts import Start
from xtransfer.runs.workdir import TEACHER, Workdir, as_record

LABELS = ("<script>document.title='run'</script>", "good")
TEXTS = {"ar": "فاز فريقنا بالمباراة", "ja": "銀行は金利を引き上げた", "de": "unsere Mannschaft <b>gewann</b>"}
ACCURACY = {TEACHER: 0.9, "vanilla": 0.65, "monox_kd": 0.85}
STEPS = {"source_dev": 50, "last": 100, "average": 100}
ORACLE = {"en": 50, "de": 50}  # and step 100 in other languages


def workdir(
    root: Path,
    *,
    targets: tuple[str, ...] = ("de", "ar", "ja"),
    labels: tuple[str, ...] = LABELS,
    seeds: tuple[int, ...] = (0, 1),
    count: int = 40,
    protocols: tuple[str, ...] = ("source_dev", "last"),
) -> Workdir:
    """Write data, predictions, results, and records of an experiment, and return its workdir."""
    result, languages = Workdir(root / "run"), ("en", *targets)
    task = TaskConfig(
        name="files",
        data_dir=str(root / "data"),
        path="{language}/{split}.tsv",
        source_language="en",
        target_languages=targets,
        id_column="id",
        unlabelled_from="none",
    )
    config = dataclasses.replace(ExperimentConfig(), task=task, seeds=seeds, objectives=("vanilla", "monox_kd"))
    facts = {"name": "files", "labels": list(labels), "synthetic": False, "source_language": "en"}
    facts |= {"target_languages": list(targets), "data": "d" * 64}
    facts |= {"teacher_checkpoint": "e" * 64, "student_checkpoint": "f" * 64}
    storage.write_atomically(result.config, json.dumps(as_record(config)))
    storage.write_atomically(result.task, json.dumps(facts))
    rng = np.random.default_rng(0)
    gold = np.arange(count) % len(labels)
    for language in languages:
        _write_data(root / "data", language, [labels[label] for label in gold])
    rows, logits = [], {}
    for objective, accuracy in ACCURACY.items():
        for seed in (0,) if objective == TEACHER else seeds:
            run = result.teacher if objective == TEACHER else result.student(objective, seed)
            run.mkdir(parents=True)
            for step, score in ((50, 0.75), (100, 0.5)):
                storage.append_jsonl(run / "metrics.jsonl", {"step": step, "loss": 1 / step, "dev_accuracy": score})
            for selection in protocols:
                for language in languages[:1] if objective == TEACHER else languages:
                    step = STEPS.get(selection, ORACLE.get(language, 100))
                    weights = weights_name(step, PROTOCOLS[selection].item)
                    path = result.predictions(run, weights, "test", language)
                    if path not in logits:
                        logits[path] = _logits(rng, gold, len(labels), accuracy)
                        storage.write_jsonl(path, _predictions(language, gold, logits[path], labels))
                    scored = metrics.scores(logits[path], gold, labels, ("accuracy", "macro_f1"))
                    row = {"task": "files", "objective": objective, "seed": seed, "step": step}
                    row |= {"selection": selection, "split": "test", "language": language}
                    rows += [row | score._asdict() for score in scored]
            stage, name = "teacher" if objective == TEACHER else "students", run.relative_to(result.root).as_posix()
            cost = Cost(stage, name, 2.5, 100, 750.0, 1000, "1 × cpu", 2**30, "process")
            storage.append_jsonl(result.costs, dataclasses.asdict(cost))
    storage.write_jsonl(result.results, rows)
    for number, language in enumerate(languages):
        unit = "character" if language == "ja" else "word"
        counts = TokenCounts("test", language, count, 1, 100 + 10 * number, 80, unit, 0.01 * number)
        storage.append_jsonl(result.tokens, dataclasses.asdict(counts))
    start = Start("python -m xtransfer.main --config 'a&b.py'", "0.1.0", "3.11.7", {"jax": "1"}, "Linux", "1 × cpu", 1)
    storage.append_jsonl(result.starts, dataclasses.asdict(start))
    return result


def read_predictions(result: Workdir, step: int) -> list[dict]:
    """Return the lines of the teacher's predictions."""
    path = result.predictions(result.teacher, step, "test", "en")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_data(directory: Path, language: str, labels: list[str]) -> None:
    for split in ("train", "dev", "test") if language == "en" else ("test",):
        lines = [f"{i}\t{TEXTS.get(language, 'our team won')} {i}\t{label}" for i, label in enumerate(labels)]
        storage.write_atomically(directory / language / f"{split}.tsv", "\n".join(["id\ttext\tlabel", *lines, ""]))


def _logits(rng: np.random.Generator, gold: np.ndarray, num_classes: int, accuracy: float) -> np.ndarray:
    """Return logits [n, K] that are right with a given probability."""
    is_right = rng.random(len(gold)) < accuracy
    guesses = np.where(is_right, gold, (gold + 1) % num_classes)
    logits = rng.normal(0, 0.3, (len(gold), num_classes))
    logits[np.arange(len(gold)), guesses] += 2
    return logits.astype(np.float32)


def _predictions(language: str, gold: np.ndarray, logits: np.ndarray, labels: tuple[str, ...]) -> list[dict]:
    return [
        {
            "id": f"files/test/{language}/{i}",
            "label": labels[label],
            "prediction": labels[int(scores.argmax())],
            "logits": [round(float(score), 5) for score in scores],
        }
        for i, (label, scores) in enumerate(zip(gold, logits, strict=True))
    ]
