"""Real processes measure every part of the embedded encoder, write the JSON, and end together."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import pytest

from tests.helpers.benchmarking import TINY, run, start
from xtransfer.benchmark import measurement
from xtransfer.benchmark.measurement import OURS
from xtransfer.errors import Exit


def test_every_part_of_the_embedded_encoder_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "of the user"))
    file = tmp_path / "report.json"
    result = run("--json", str(file), "--batch-size", "8", *TINY)
    assert result.returncode == 0, result.stderr
    assert "| training | xtransfer |" in result.stdout and "× transformers" not in result.stdout
    record = json.loads(file.read_text())
    assert set(record) == {
        *("format", "command", "against", "pairs", "seconds"),
        *("machine", "versions", "config", "texts", "sides", "parts"),
    }
    assert record["config"]["student"]["batch_size"] == 8 and record["config"]["student"]["packed"] is False
    assert record["machine"]["devices"] == 1 and record["machine"]["cores"] >= 1
    assert record["versions"]["jax"] == jax.__version__
    assert (record["texts"]["files"], record["texts"]["number"]) == (None, 1000)
    assert 0 < record["texts"]["truncated"] < 1000, "the reviews have more than 16 tokens"
    (side,) = record["sides"].values()
    assert side["until_first_step_seconds"] == pytest.approx(
        sum(side[f"{name}_seconds"] for name in ("imports", "loading", "compiling", "first_step"))
    )
    assert side["peak_bytes"] > 2**20
    assert "| xtransfer, second start |" in result.stdout and set(side["second_start"]) < set(side)
    assert not (tmp_path / "of the user").exists()
    assert [part["part"] for part in record["parts"]] == list(measurement.PARTS)
    for part in record["parts"]:
        assert (part["ratios"], part["ratio"], len(part["pairs"])) == (None, None, 2)
        for pair in part["pairs"]:
            burst = pair[OURS]
            assert burst["examples"] == part["examples"] and 0 < burst["tokens"] <= 16 * burst["examples"]
            assert burst["tokens"] <= burst["slots"]
    training = record["parts"][0]
    # Eight rows of 16 tokens and of one vector for the head: 6 FLOPs for each of these and each weight, and attention,
    # 12 · 16 · 128 for each query. Only keys and values of the last of three layers are computed for all tokens.
    square, wide, attention = 6 * 128 * 128, 6 * 2 * 128 * 512, 12 * 16 * 128
    layers = 8 * 16 * 2 * (4 * square + wide + attention)
    last = 8 * 16 * 2 * square + 8 * (2 * square + wide + attention)
    expected = layers + last + 8 * square  # with the pooler
    assert training["step"]["flops"] == pytest.approx(expected, rel=0.01)
    assert (training["step"]["rows"], training["step"]["row_length"]) == (8, 16)
    assert record["parts"][3]["step"] is None


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--parts", "tokenising", "--seconds", "600"], "1 of 1: tokenising"),
        (["--parts", "labelling", *TINY], "second start: "),
    ],
)
def test_ctrl_c_ends_all_processes_with_one_line(
    flags: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_ctrl_c: None
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start(*flags, start_new_session=True)
    assert process.stdout is not None
    while not (output := process.stdout.readline()).startswith(line):
        assert output, "it ended"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=900)
    assert (process.returncode, errors) == (
        Exit.INTERRUPTED,
        "interrupted: nothing was written; run the command again\n",
    )
    assert not list(tmp_path.iterdir()), "texts or compiled programs are left"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker is still running")
