"""An experiment whose text is on disk has the results of one whose text is in memory, bit for bit."""

import json
from pathlib import Path

import pytest

from tests.helpers import tiny
from xtransfer import main
from xtransfer.config import load
from xtransfer.data import examples, text_cache
from xtransfer.describe.dataset import describe, transfer_rows
from xtransfer.runs.workdir import Workdir

FAST = ("--config.teacher.steps=6", "--config.teacher.evaluations=1", "--config.student.steps=6")
FAST += ("--config.student.evaluations=2", "--config.objectives=('vanilla','monox_kd')")
CLOCK = ("seconds", "examples_per_second")


def files(workdir: Path) -> dict[str, object]:
    """Return what must not differ: logits, scores, results, and predictions."""
    found: dict[str, object] = {}
    for pattern in ("logits/*/*.npy", "logits/*/ids.txt", "logits/*/manifest.json", "predictions/**/*.jsonl"):
        found |= {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.glob(pattern)}
    for path in (*workdir.glob("**/metrics.jsonl"), workdir / "results.jsonl", workdir / "task.json"):
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else [{}]
        kept = [{key: value for key, value in row.items() if key not in (*CLOCK, "digest")} for row in rows]
        found[str(path.relative_to(workdir))] = kept if path.suffix == ".jsonl" else path.read_text()
    return found


def test_results_are_the_same_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.write_task(tmp_path / "data")
    teacher, student = tiny.checkpoint(tmp_path / "teacher", seed=1), tiny.checkpoint(tmp_path / "student", hidden=8)
    path = tiny.config_file(tmp_path / "tiny.py", data, teacher, student)
    found, described, transfer = [], [], []
    for name, large in (("memory", 1 << 60), ("disk", 0)):
        monkeypatch.setattr(text_cache, "LARGE", large)
        for module in (examples, text_cache):
            monkeypatch.setattr(module, "BATCH", 8)
        flags = [*FAST, f"--config.task.cache_dir={tmp_path / name / 'cache'}"]
        main.main(["--config", str(path), "--workdir", str(tmp_path / name / "workdir"), *flags])
        found.append(files(tmp_path / name / "workdir"))
        config = load(str(path), flags)
        described.append(describe(config, 2, Workdir(tmp_path / name / "workdir")))
        transfer.append(list(transfer_rows(config)))
        assert bool(list((tmp_path / name / "cache").glob("texts/*/examples.arrow"))) == (name == "disk")
    assert len([name for name in found[0] if name.startswith("logits")]) == 3  # a shard, its ids, and the manifest
    assert found[0] == found[1]
    assert described[0] == described[1]
    assert transfer[0] == transfer[1]
