"""Loggers receive what the loop reads, once per step and start; no failure of theirs reaches the run."""

import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import events, group
from tests.train.test_loop import TinyRun, batch_at
from xtransfer.errors import UserError
from xtransfer.train import logger_flags, loop, metrics_log, state, tracking
from xtransfer.train.loop import Plan
from xtransfer.train.tensorboard import TensorBoard
from xtransfer.train.tracking import LoggerSource, Tracking, tracked

ROOT = Path(__file__).parents[2]
PLAN = Plan("test", steps=120, evaluations=2, seed=5)  # windows end after steps 50, 60, 100, and 120


class Recorder:
    """A logger that keeps its calls, and fails in the named one."""

    def __init__(self, fails_in=None):
        self.calls, self.fails_in = [], fails_in

    def _note(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.fails_in:
            raise ConnectionError("no\nnetwork")

    def start(self, run, settings):
        self._note("start", run, settings)

    def scalars(self, step, values):
        self._note("scalars", step, values)

    def finish(self, status):
        self._note("finish", status)


def source(logger):
    return LoggerSource("--logger test.py", lambda: logger)


def fit(directory, tracking, interrupt=None, bad_loss=False):
    """Train the tiny run on batches of one row of four tokens per example, three of them real."""

    def batch(i):
        if i == interrupt:
            raise KeyboardInterrupt
        data = batch_at(i)
        if bad_loss:
            data["x"] = data["x"] * np.float32(np.inf)
        return data | {"segment_ids": np.tile(np.array([1, 1, 1, 0], np.int32), (8, 1))}

    run = TinyRun()
    start = loop.Start(run.initial, state.abstract(run.params, run.tx, run.mesh))
    rates = np.arange(PLAN.steps, dtype=np.float32) / 8
    loop.fit(directory, PLAN, start, run.step, rates, batch, run.score, run.mesh, tracking)


def scalars(recorder):
    return [(step, values) for name, step, values in (call for call in recorder.calls if call[0] == "scalars")]


def test_rates_of_a_window_by_hand(tmp_path, monkeypatch):
    times = iter([10.0, 12.0, 20.0, 21.5])
    monkeypatch.setattr(tracking, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    recorder = Recorder()
    with tracked(Tracking((source(recorder),), {"seed": 3}), "teacher", tmp_path) as tracker:
        tracker.start(4, num_slices=2)
        for step, rows in (
            (5, [[1, 1, 2, 0], [1, 0, 0, 0]]),  # 3 examples, 4 of 8 tokens
            (6, [[1, 1, 1, 1], [1, 2, 2, 3]]),  # 4 examples, 8 of 8 tokens
            (7, [[1, 0, 0, 0], [1, 2, 0, 0]]),  # 3 examples, 3 of 8 tokens; prefetched before the window ends
        ):
            batch = {"segment_ids": np.array(rows, np.int32)}
            assert tracker.counted(step, batch) is batch
        tracker.window(6, {"loss": 0.5, "learning_rate": 1.25})
        tracker.scores(6, {"dev_accuracy": 0.75, "dev_log_loss": 0.4}, {"de": {"dev_log_loss": 0.5}})
        tracker.window(7, {"loss": 0.25, "learning_rate": 1.5})
    name, run, given = recorder.calls[0]
    assert (name, run.name, run.directory, run.resumed_from) == ("start", "teacher", tmp_path, 4)
    assert given == {"seed": 3} and re.fullmatch("[0-9a-f]{32}", run.id)
    # This process counts one of two slices: 2 × 7 examples in 12 − 10 seconds, then 2 × 3 in 21.5 − 20.
    first = {"loss": 0.5, "learning_rate": 1.25, "examples_per_second": 7.0, "real_token_share": 0.75}
    last = {"loss": 0.25, "learning_rate": 1.5, "examples_per_second": 4.0, "real_token_share": 0.375}
    assert recorder.calls[1:] == [
        ("scalars", 6, {f"train/{key}": value for key, value in first.items()}),
        ("scalars", 6, {"dev/accuracy": 0.75, "dev/log_loss": 0.4, "oracle_not_zero_shot/log_loss/de": 0.5}),
        ("scalars", 7, {f"train/{key}": value for key, value in last.items()}),
        ("finish", "finished"),
    ]


def test_the_loop_sends_every_window_and_score(tmp_path):
    recorder = Recorder()
    fit(tmp_path, Tracking((source(recorder),)))
    sent, rows = scalars(recorder), metrics_log.read_metrics(tmp_path)
    assert [step for step, _ in sent] == [50, 60, 60, 100, 120, 120]
    assert [row["step"] for row in rows] == [60, 120]
    for row in rows:
        windows = [values for step, values in sent if step == row["step"] and "train/loss" in values]
        assert [values["train/loss"] for values in windows] == [row["loss"]]
        assert (row["step"], {"dev/accuracy": row["dev_accuracy"]}) in sent
    assert {values.get("train/real_token_share", 0.75) for _, values in sent} == {0.75}
    rates = [(step, values["train/learning_rate"]) for step, values in sent if "train/learning_rate" in values]
    assert rates == [(step, (step - 1) / 8) for step in (50, 60, 100, 120)]
    assert recorder.calls[-1] == ("finish", "finished")


def test_a_loss_keeps_its_sign_and_a_score_that_ranks_is_not_logged(tmp_path, monkeypatch):
    recorder = Recorder()
    scores = {"dev_accuracy": 0.75, "dev_log_loss": 0.5, metrics_log.DEV_SCORE: -0.5}
    in_german = {"dev_accuracy": 0.25, "dev_log_loss": 2.0, metrics_log.DEV_SCORE: -2.0}
    monkeypatch.setattr(
        TinyRun,
        "score",
        lambda self, params: {
            **scores,
            metrics_log.TARGET_DEV_SCORES: {"de": -2.0},
            metrics_log.TARGET_DEV_METRICS: {"de": in_german},
        },
    )
    fit(tmp_path, Tracking((source(recorder),)))
    expected = {"dev/accuracy": 0.75, "dev/log_loss": 0.5}
    expected |= {"oracle_not_zero_shot/accuracy/de": 0.25, "oracle_not_zero_shot/log_loss/de": 2.0}
    assert [values for _, values in scalars(recorder) if "dev/accuracy" in values] == [expected, expected]
    for row in metrics_log.read_metrics(tmp_path):
        assert row[metrics_log.DEV_SCORE] == -0.5 and row[metrics_log.TARGET_DEV_SCORES] == {"de": -2.0}
        assert metrics_log.TARGET_DEV_METRICS not in row


def test_the_status_says_how_a_run_ended_and_the_id_stays(tmp_path):
    stopped, resumed, failed = Recorder(), Recorder(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", Tracking((source(stopped),)), interrupt=70)
    fit(tmp_path / "a", Tracking((source(resumed),)))
    with pytest.raises(UserError, match="not finite"):
        fit(tmp_path / "b", Tracking((source(failed),)), bad_loss=True)
    assert [logger.calls[-1][1] for logger in (stopped, resumed, failed)] == ["stopped", "finished", "failed"]
    runs = [logger.calls[0][1] for logger in (stopped, resumed, failed)]
    assert [run.resumed_from for run in runs] == [0, 60, 0]
    assert runs[0].id == runs[1].id != runs[2].id
    fit(tmp_path / "a", Tracking((source(again := Recorder()),)))
    assert scalars(again) == []


@pytest.mark.parametrize("call", ["start", "scalars", "finish"])
def test_a_failing_logger_costs_one_warning(tmp_path, capsys, call):
    broken, sound = Recorder(fails_in=call), Recorder()
    with tracked(Tracking((source(broken), source(sound))), "teacher", tmp_path) as tracker:
        tracker.start(0, 1)
        for step in (1, 2):
            tracker.counted(step, {"segment_ids": np.ones((1, 1), np.int32)})
            tracker.window(step, {"loss": 1.0})
    where = {"scalars": "scalars at step 1"}.get(call, call)
    assert capsys.readouterr().out == (
        f"warning: --logger test.py: {where} failed (ConnectionError: no network); "
        "teacher is no longer logged with it\n"
    )
    assert [name for name, *_ in broken.calls].count(call) == 1 and broken.calls[-1][0] == call
    assert [name for name, *_ in sound.calls] == ["start", "scalars", "scalars", "finish"]


def test_a_logger_that_exits_or_cannot_be_created_costs_one_warning(tmp_path, capsys):
    sources = (LoggerSource("--logger a.py", sys.exit), LoggerSource("--logger b.py", lambda: None))
    with tracked(Tracking(sources), "teacher", tmp_path) as tracker:
        tracker.start(0, 1)
        tracker.window(1, {"loss": 1.0})
    warnings = capsys.readouterr().out.splitlines()
    assert [line.partition(" failed")[0] for line in warnings] == [
        "warning: --logger a.py: start",
        "warning: --logger b.py: start",
    ]


def test_a_resumed_run_shows_each_step_once_in_tensorboard(tmp_path):
    files = Tracking((LoggerSource("--tensorboard", TensorBoard),))
    fit(tmp_path / "whole", files)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", files, interrupt=110)  # step 100 is logged, and the last checkpoint is that of step 60
    assert [step for step, _ in events.curves(tmp_path / "cut")["train/loss"]] == [50, 60, 100]
    fit(tmp_path / "cut", files)
    assert len(events.files(tmp_path / "cut")) == 2
    whole, cut = events.curves(tmp_path / "whole"), events.curves(tmp_path / "cut")
    assert [step for step, _ in cut["train/loss"]] == [50, 60, 100, 120]
    for tag in ("train/loss", "dev/accuracy", "train/real_token_share"):
        assert cut[tag] == whole[tag]
    assert cut["train/learning_rate"] == [(50, 49 / 8), (60, 59 / 8), (100, 99 / 8), (120, 119 / 8)]
    rows = metrics_log.read_metrics(tmp_path / "cut")
    assert cut["dev/accuracy"] == [(row["step"], float(np.float32(row["dev_accuracy"]))) for row in rows]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path / "cut" / "tensorboard")).Reload()
    for tag, curve in cut.items():
        assert [(point.step, point.value) for point in shown.Scalars(tag)] == curve


KILLED = """
import os, signal, sys
from pathlib import Path
from xtransfer.train.tensorboard import TensorBoard
from xtransfer.train.tracking import Run

logger = TensorBoard()
logger.start(Run("teacher", "0", Path(sys.argv[1]), 0), {})
for step in range(1, 4):
    logger.scalars(step, {"train/loss": step / 4})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_whole_records(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert events.curves(tmp_path) == {"train/loss": [(1, 0.25), (2, 0.5), (3, 0.75)]}


def test_a_full_disk_costs_one_warning(tmp_path, capsys, monkeypatch):
    with tracked(Tracking((LoggerSource("--tensorboard", TensorBoard),)), "teacher", tmp_path) as tracker:
        tracker.start(0, 1)
        full = Path("/dev/full").open("wb")  # noqa: SIM115  # closed with the logger
        monkeypatch.setattr(tracker._loggers[0][1]._writer, "_writer", full)
        for step in (1, 2):
            tracker.counted(step, {"segment_ids": np.ones((1, 1), np.int32)})
            tracker.window(step, {"loss": 1.0})
    warning = "warning: --tensorboard: scalars at step 1 failed (OSError: [Errno 28] No space left on device); "
    assert capsys.readouterr().out == f"{warning}teacher is no longer logged with it\n"
    with pytest.raises(OSError, match="No space left"):
        full.close()


def parse(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    logger_flags.add_flags(parser)
    return logger_flags.parse_flags(parser.parse_args(argv))


def test_flags_choose_loggers(tmp_path):
    (tmp_path / "mine.py").write_text("OPENED = []\ndef get_logger():\n    OPENED.append(1)\n    return OPENED\n")
    assert parse() == ()
    board, mine = parse("--tensorboard", "--logger", str(tmp_path / "mine.py"))
    assert board == LoggerSource("--tensorboard", TensorBoard)
    assert mine.flag == f"--logger {tmp_path / 'mine.py'}"
    assert [len(mine.create()), len(mine.create())] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": no such file"),
        ("import wandb_is_not_here", ": ModuleNotFoundError: No module named 'wandb_is_not_here'"),
        ("get_logger = 1", " has no function get_logger; see 'A logger' in CONTRIBUTING.md"),
        ("def get_loger(): pass", " has no function get_logger; see 'A logger' in CONTRIBUTING.md"),
    ],
)
def test_a_bad_logger_file_is_named_before_training(tmp_path, content, message):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        parse("--logger", str(path))
    assert str(caught.value) == f"--logger {path}{message}"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tensorboard needs a package that is not installed: pip install tensorboard"):
        parse("--tensorboard")


def test_only_process_0_has_loggers(tmp_path):
    body = f"""
    from pathlib import Path
    from xtransfer.train import logger_flags
    parser = argparse.ArgumentParser()
    logger_flags.add_flags(parser)
    sources = logger_flags.parse_flags(parser.parse_args(["--tensorboard"]))
    Path({str(tmp_path)!r}, f"{{me}}.txt").write_text(str(len(sources)))
"""
    group.run(["-c", group.BINARY.format(flags=[], body=body)], 2, 1, tmp_path / "log")
    assert [(tmp_path / f"{index}.txt").read_text() for index in (0, 1)] == ["1", "0"]


class Wandb(types.ModuleType):
    """A stand-in for W&B, which refuses steps that do not increase, as W&B does."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.active = {}, None

    def init(self, *, project, id, name, config, resume):
        assert (project, resume) == ("xtransfer", "allow") and self.active is None and "/" not in id
        self.active = self.runs.setdefault(id, types.SimpleNamespace(name=name, config=config, points={}, statuses=[]))
        self.active.log, self.active.finish = self.log, self.finish
        return self.active

    def log(self, values, step):
        if step >= max(self.active.points, default=0):
            self.active.points.setdefault(step, {}).update(values)

    def finish(self, exit_code):
        self.active.statuses.append(exit_code)
        self.active = None


def test_the_logger_of_the_contributing_page_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page.partition("### A logger")[2].partition("\n### ")[0], re.DOTALL)
    (tmp_path / "wandb_logger.py").write_text(code)
    sources = parse("--logger", str(tmp_path / "wandb_logger.py"))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", Tracking(sources, {"seed": 3}), interrupt=110)
    fit(tmp_path / "run", Tracking(sources, {"seed": 3}))
    (run,) = wandb.runs.values()
    assert (run.name, run.config, run.statuses) == ("test", {"seed": 3}, [1, 0])
    assert list(run.points) == [50, 60, 100, 120]
    assert [step for step, values in run.points.items() if "dev/accuracy" in values] == [60, 120]
