"""A second start finds the programs of the first one, when nothing else runs, and only if there are any."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny
from tests.helpers.compilation import QUICK_COMPILE
from xtransfer.benchmark import measurement
from xtransfer.benchmark.measurement import OURS, PEER, Plan, measure
from xtransfer.config import BenchmarkConfig, override_defaults
from xtransfer.errors import MachineError

# Our side, with every program worth keeping.
_EAGER = """
from xtransfer.benchmark import ours, worker
from xtransfer.runtime import compilation_cache

compilation_cache._MIN_SECONDS = 0.0
worker.serve(ours.Ours())
"""
_BURST = {"seconds": 1.0, "examples": 8, "tokens": 8, "slots": 8}


def test_second_start_reads_what_the_first_start_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eager.py").write_text(_EAGER)
    monkeypatch.setattr(measurement, "_OURS_MODULE", "eager")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILE)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "of the user"))
    texts = tmp_path / "measurement" / "texts.json"
    texts.parent.mkdir()
    texts.write_text(json.dumps(["the film is very good"] * 8))
    checkpoint = tiny.checkpoint(tmp_path / "model")
    flags = [f"--config.student.{key}" for key in (f"checkpoint={checkpoint}", "max_length=16", "batch_size=4")]
    settings = dataclasses.asdict(override_defaults(flags, BenchmarkConfig))
    result = measure(Plan(("training",), 1, 0.001), settings, texts, 1, against=False)
    assert result.second_start is not None
    assert (tmp_path / "measurement" / "compiled").is_dir() and not (tmp_path / "of the user").exists()
    assert result.sides[OURS].closing_facts["programs_found"] == 0
    assert result.second_start.closing_facts["programs_found"] > 0


class FakeWorker:
    """A worker that answers at once, and keeps a list of what happens to all workers."""

    events: list[str]
    fails = ""

    def __init__(self, name: str, module: str, environment: Any = None):
        self.name, self.idle_seconds, self.idle_cpu_seconds = name, 0.0, 0.0
        self.part = ""
        self.events.append(f"start {name}")

    def ask(self, **request: Any) -> dict[str, Any]:
        self.part = request.get("part", self.part)
        if self.name == self.fails:
            raise MachineError(f"the process of {self.name} was killed")
        return {
            "open": {"directory": "", "classes": 2, "frozen": [], "platform": "cpu"},
            "prepare": {"unit": 8},
            "run": _BURST,
            "indices": {"indices": []},
            "step": {"step": None if self.part == "tokenising" else {}},
            "close": {"peak_bytes": 1, "memory": "process"},
        }[request["do"]]

    def close(self) -> None:
        self.events.append(f"end {self.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    FakeWorker.events, FakeWorker.fails = [], ""
    monkeypatch.setattr(measurement, "Worker", FakeWorker)
    monkeypatch.setattr(measurement, "_REST_SECONDS", 0)
    yield FakeWorker.events


def measure_fake_workers(*parts: str, against: bool) -> measurement.Measurement:
    def announce() -> None:
        FakeWorker.events.append("announced")

    return measure(
        Plan(parts, 1, 1.0), {"student": {}}, Path("texts.json"), 1, against=against, on_second_start=announce
    )


def test_other_processes_have_ended_before_the_second_start(events: list[str]) -> None:
    assert measure_fake_workers("training", "tokenising", against=True).second_start is not None
    assert events == [
        *(f"start {OURS}", f"start {PEER}", f"end {PEER}", f"end {OURS}"),
        *("announced", "start xtransfer's second start", "end xtransfer's second start"),
    ]


def test_tokenising_has_no_second_start_because_it_compiles_nothing(events: list[str]) -> None:
    assert measure_fake_workers("tokenising", "training", against=False).second_start is None
    assert events == [f"start {OURS}", f"end {OURS}"]


def test_an_error_of_the_second_start_ends_the_measurement(events: list[str]) -> None:
    FakeWorker.fails = "xtransfer's second start"
    with pytest.raises(MachineError, match="the process of xtransfer's second start was killed"):
        measure_fake_workers("labelling", against=False)
    assert events[-1] == "end xtransfer's second start"
