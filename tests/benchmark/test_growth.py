"""`benchmark --growth` runs every stage in a process of its own, and reports its time and memory."""

import json
import statistics
from pathlib import Path

import pytest

from xtransfer.benchmark import __main__ as benchmark
from xtransfer.benchmark import growth, growth_stage
from xtransfer.benchmark.growth_stage import STAGES
from xtransfer.data import text_cache
from xtransfer.errors import UserError


def test_the_texts_have_the_lengths_of_premises_and_depend_on_the_numbers_alone() -> None:
    texts = list(growth.synthetic_texts("en", 4000, seed=1))
    lengths = [len(text.split()) for text in texts]
    assert statistics.mean(lengths) == pytest.approx(20, abs=1)
    assert min(lengths) >= 1
    assert max(lengths) <= 100
    assert list(growth.synthetic_texts("en", 4000, seed=1)) == texts
    assert list(growth.synthetic_texts("en", 4000, seed=2)) != texts


def test_a_stage_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage reading ended with status"):
        growth._run("reading", 1, ["xtransfer.benchmark.growth_stage", "reading", str(tmp_path / "none.py")])


def test_the_cost_of_a_process_is_its_own(tmp_path: Path) -> None:
    module = tmp_path / "hungry.py"
    module.write_text("x = bytearray(300 << 20)\nx[::4096] = bytes(len(x[::4096]))\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        cost = growth._run("hungry", 10, ["hungry"])
    assert 300 << 20 < cost.peak_bytes < 400 << 20
    assert cost.cpu_seconds > 0
    row = growth.table([growth.StageCost("a", 2.0, 1.5, 10, 3 << 20)], 10).rows[0]
    assert row == ("a", "2.0", "1.5", "5", "3")


@pytest.mark.parametrize("flags", [["--growth", "10", "--pairs", "3"], ["--directory", "x"]])
def test_flags_of_the_other_measurement_are_refused(flags: list[str]) -> None:
    with pytest.raises(UserError, match="leave it out"):
        benchmark.main(flags)


def test_every_stage_is_measured(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands: list[list[str]] = []

    def run(name: str, texts: int, arguments: list[str]) -> growth.StageCost:
        commands.append(list(arguments))
        if name == "main":
            (tmp_path / "d/300/workdir/predictions").mkdir(parents=True)
            row = {"stage": "labelling", "run": "teacher", "seconds": 4.0, "examples": 900, "real_tokens": 1.0}
            row |= {"tokens": 2, "devices": "1 × cpu", "peak_bytes": 1 << 20, "memory": "process"}
            (tmp_path / "d/300/workdir/costs.jsonl").write_text(json.dumps(row) + "\n")
        return growth.StageCost(name, 2.0, 1.0, texts, 2 << 20)

    monkeypatch.setattr(growth, "_run", run)
    benchmark.main(["--growth", "300", "--directory", str(tmp_path / "d"), "--json", str(tmp_path / "out.json")])
    stages = json.loads((tmp_path / "out.json").read_text())["stages"]
    names = [stage["name"] for stage in stages]
    assert names == [*STAGES, "labelling teacher", "main, all stages", "describe", "evaluate"]
    assert stages[3] == {"name": "labelling teacher", "seconds": 4.0, "cpu_seconds": 0.0, "texts": 900} | {
        "peak_bytes": 1 << 20
    }
    assert [command[0].rpartition(".")[2] for command in commands[3:]] == ["main", "describe", "evaluate"]
    assert "| labelling teacher | 4.0 |  | 225 | 1 |" in capsys.readouterr().out
    lines = (tmp_path / "d/300/data/en/unlabelled.jsonl").read_text().splitlines()
    assert len(lines) == 300


def test_the_first_stage_reads_the_prepared_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growth.prepare(tmp_path, 50)
    monkeypatch.setattr(text_cache, "LARGE", 0)
    growth_stage.main(["reading", str(tmp_path / "config.py")])
    assert len(list((tmp_path / "cache/texts").glob("*/examples.arrow"))) >= 2
