"""The command: tables and notes by hand, errors of workers, and refusals in one line."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers import tiny
from xtransfer.benchmark import __main__ as benchmark
from xtransfer.benchmark import ours, peer, report
from xtransfer.benchmark.measurement import OURS, PEER, SECOND_START, FirstBatch, Measurement, PartResult, Side, Start
from xtransfer.benchmark.numbers import Burst
from xtransfer.benchmark.worker import Worker
from xtransfer.config import BenchmarkConfig, override_defaults
from xtransfer.errors import CheckpointError, ConfigError, Exit, MachineError, UserError
from xtransfer.runtime import terminal


def refused(*flags: str) -> str:
    with pytest.raises(UserError) as raised:
        benchmark.main(list(flags))
    assert "\n" not in str(raised.value)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_what_makes_no_sense_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: pytest.fail("it was measured"))
    assert refused("--parts", "train") == (
        "ConfigError: --parts train: no such part; did you mean 'training'?; choose from training, labelling, "
        "prediction, tokenising"
    )
    assert refused("--parts", "training,training") == "ConfigError: --parts training,training: name each part once"
    assert refused("--batch-size", "8", "--config.student.batch_size=8") == (
        "ConfigError: --batch-size and --config.student.batch_size are the same setting: give one of them"
    )
    assert refused("--config.task.labelled=8").startswith("ConfigError: unknown config key task; the keys are student,")
    assert refused("--config.student.compute_dtype=float16").startswith("ConfigError: config key student.compute_dtype")
    assert refused("--json", str(tmp_path)) == f"ConfigError: {tmp_path} already exists; choose another file for --json"
    assert refused("--text", str(tmp_path / "a.txt")) == f"DataError: {tmp_path / 'a.txt'}: no such file"
    for flags in (["--seconds", "0"], ["--seconds", "nan"], ["--pairs", "0"], ["--against", "tensorflow"]):
        with pytest.raises(SystemExit) as stopped:
            benchmark.main(flags)
        assert stopped.value.code == Exit.CONFIG
    capsys.readouterr()
    monkeypatch.setattr(peer, "available", lambda: False)
    assert refused("--against", "transformers") == (
        "MachineError: --against transformers needs PyTorch, which is not installed: install the extra torch, with "
        "XTRANSFER_EXTRAS=torch launch/test.sh --version"
    )


@pytest.fixture
def worker_state() -> Iterator[None]:
    """Undo what a worker sets for its whole process."""
    quiet = terminal.console.quiet
    yield
    terminal.console.quiet = quiet


@pytest.mark.usefixtures("worker_state")
def test_what_transformers_cannot_do_is_refused(tmp_path: Path) -> None:
    directory, texts = tiny.checkpoint(tmp_path / "model"), tmp_path / "texts.json"
    texts.write_text('["the film"]')

    def open_ours(*overrides: str) -> dict[str, Any]:
        flags = [
            f"--config.student.{override}" for override in (f"checkpoint={directory}", "max_length=16", *overrides)
        ]
        settings = override_defaults(flags, BenchmarkConfig)
        return ours.Ours()(
            {
                "do": "open",
                "spawned": time.monotonic(),
                "settings": benchmark.dataclasses.asdict(settings),
                "texts": str(texts),
                "against": True,
            }
        )

    assert open_ours()["frozen"] == []
    with pytest.raises(ConfigError, match="no bert classifier that pools by mean; choose another student.pooling"):
        open_ours("pooling=mean")
    with pytest.raises(ConfigError, match=r"head\.bias, which student.frozen selects, is no tensor of its own"):
        open_ours("frozen=('^head[.]',)")
    with pytest.raises(ConfigError, match="student.max_length is 64, but .* has 32 positions"):
        open_ours("max_length=64")


def test_a_worker_that_dies_is_an_error_with_its_status() -> None:
    worker = Worker("xtransfer", "xtransfer.benchmark.ours")
    worker._process.kill()
    with pytest.raises(MachineError, match="the process of xtransfer was killed, as when memory runs out"):
        worker.ask(do="open")
    worker.close()


def test_a_worker_collects_garbage() -> None:
    code = "import gc; from xtransfer import startup; startup.prepare(); from xtransfer.benchmark import worker; "
    code += "worker.serve(lambda request: {'collects': gc.isenabled()})"
    result = subprocess.run([sys.executable, "-c", code], input="{}\n", capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["collects"] is True


def test_an_error_in_a_worker_keeps_its_kind(tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text('["the film"]')
    worker = Worker("xtransfer", "xtransfer.benchmark.ours")
    settings = benchmark.dataclasses.asdict(BenchmarkConfig())
    settings["student"]["checkpoint"] = str(tmp_path)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        worker.ask(do="open", settings=settings, texts=str(texts), against=False)
    worker.close()


STEP = {
    "rows": 8,
    "row_length": 128,
    "products": 3,
    "flops": 6_000_000_000,
    "rounds": [
        {"step_seconds": 0.03, "products_seconds": 0.01},
        {"step_seconds": 0.02, "products_seconds": 0.012},
        {"step_seconds": 0.06, "products_seconds": 0.015},
    ],
}
FACTS = {"imports_seconds": 2.0, "loading_seconds": 1.0, "tokens": 3000, "truncated": 5, "parameters": 1_500_000}
SIDE = Side(FACTS, FirstBatch(0.25, 4.5, 0.5), {"peak_bytes": 800_000_000, "memory": "process"}, 10.0, 0.1)
MEASURED = Measurement(
    {
        OURS: SIDE,
        PEER: Side(FACTS, FirstBatch(0.0, 0.4, 0.5), {"peak_bytes": 2_000_000, "memory": "device"}, 10.0, 9.0),
    },
    (
        PartResult(
            "training",
            60,
            {
                OURS: (Burst(1.0, 60, 1500, 2000), Burst(2.0, 60, 1500, 2000), Burst(0.5, 60, 1500, 2000)),
                PEER: (Burst(2.0, 60, 1500, 3000), Burst(3.0, 60, 1500, 3000), Burst(2.0, 60, 1500, 3000)),
            },
            STEP,
        ),
    ),
    Start(FACTS, FirstBatch(0.25, 1.5, 0.5), {"peak_bytes": 600_000_000, "memory": "process", "programs_found": 0}),
)


def test_the_tables_by_hand() -> None:
    rates, steps, starts = report.tables(MEASURED)
    assert rates.rows == (
        ("training", OURS, "60.0 (30.0–120)", "1,500", "75%", "2.00 (1.50–4.00)"),
        ("", PEER, "30.0 (20.0–30.0)", "750", "50%", "–"),
    )
    # 200, 300, and 100 GFLOP/s; alone 600, 500, and 400; the shares are 1/3, 0.6, and 1/4.
    assert steps.rows == (("training", "8 × 128", "6.00", "200", "500", "33%"),)
    assert starts.rows == (
        (OURS, "2.00", "1.25", "4.00", "0.50", "7.75", "800"),
        (SECOND_START, "2.00", "1.25", "1.00", "0.50", "4.75", "600"),
        (PEER, "2.00", "1.00", "0.00", "0.40", "3.40", "2 of the device"),
    )
    assert all(len(row) == len(table.header) for table in (rates, steps, starts) for row in table.rows)


def test_the_second_start_belongs_to_our_side_in_the_json() -> None:
    sides = report.sides_as_json(MEASURED)
    assert sides[PEER]["second_start"] is None
    assert sides[OURS]["second_start"] == {
        "imports_seconds": 2.0,
        "loading_seconds": 1.25,
        "compiling_seconds": 1.0,
        "first_step_seconds": 0.5,
        "until_first_step_seconds": 4.75,
        "peak_bytes": 600_000_000,
        "memory": "process",
        "programs_found": 0,
    }


def test_the_notes_name_everything_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {
        "pairs": 3,
        "texts": {"number": 100, "tokens": 3000, "truncated": 5},
        "machine": {"load_before": 1.26, "cores": 2, "cpu": "Abacus", "devices": 1, "device_kind": "cpu"},
        "config": {"student": {"checkpoint": "m", "max_length": 64, "batch_size": 32, "compute_dtype": "float32"}},
    }
    assert list(report.notes(record, MEASURED)) == [
        "examples in each burst: training 60; medians of 3 bursts, with the range in brackets",
        "5 of 100 texts are longer than 64 tokens and were truncated",
        "the second start found no compiled programs: they compile too fast to be kept, could not be written, or "
        "JAX_ENABLE_COMPILATION_CACHE=0 is set",
        "warning: 1.3 other processes were running on 2 cores; measure again on a quiet machine",
        "warning: transformers took 9.0 s of processor time in the 10.0 s in which it should have been idle",
    ]
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=screen, force_terminal=True, width=120, color_system=None))
    benchmark.show(record, MEASURED)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "m (1.5 M parameters), 100 texts of 30.0 tokens, batches of 32, float32"
    assert lines[1] == "Abacus, 2 cores; JAX on 1 × cpu"
    assert any("2.00 (1.50–4.00)" in line for line in lines)
