"""Scores decide which checkpoint is used. A damaged one is restored from its copy, or named with its line alone."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.test_checksums import flipped
from tests.train.test_damaged_checkpoints import steps_on_disk
from tests.train.test_loop import PLAN, TinyRun, save_scores_as_before
from xtransfer.errors import UserError
from xtransfer.runs.find import read_dev_scores, selected_steps
from xtransfer.train import loop, metrics_log
from xtransfer.train.checkpoints import fall_back

SCORES = [0.5, 0.9, 0.3, 0.6]
LONGER = loop.Plan("test", steps=30, evaluations=6, seed=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return the directory of a finished run with rows of the steps 5 to 20, which kept 10 (the best) and 20."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    TinyRun(SCORES.copy()).fit(directory, PLAN)
    assert steps_on_disk(directory) == [10, 20]
    return directory


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rewrite(run: Path, change, *, signed: bool = False) -> None:
    """Change the lines of metrics.jsonl; unsigned ones are as older versions wrote them."""
    path = run / metrics_log.METRICS_FILE
    lines = path.read_text().splitlines()
    if not signed:
        rows = [json.loads(line) for line in lines]
        lines = [json.dumps({key: value for key, value in row.items() if key != "digest"}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in change(lines)))


def test_any_flipped_bit_of_the_rows_changes_no_selection_and_is_mended(finished, run):
    path, content, draw = (
        run / metrics_log.METRICS_FILE,
        (finished / metrics_log.METRICS_FILE).read_bytes(),
        random.Random(0),
    )
    rows = metrics_log.read_metrics(finished)
    for bit in draw.sample(range(8 * len(content) - 8), 150):
        path.write_bytes(flipped(content, bit))
        assert metrics_log.read_metrics(run) == rows
        assert selected_steps(run) == {"source_dev": 10, "last": 20}
        metrics_log.mend(run)
        assert path.read_bytes() == content


def test_a_flipped_score_is_named_and_nobody_loses_a_checkpoint(run, capsys):
    rewrite(run, lambda lines: [line.replace("0.9", "0.1") for line in lines], signed=True)
    assert selected_steps(run)["source_dev"] == 10
    line = (
        "metrics.jsonl:2: this row is damaged (its content does not match its digest), so its copy in checkpoints/ is"
    )
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("content", [None, "", '{"step": 5, "los'])
def test_lost_rows_are_restored(finished, run, content):
    path = run / metrics_log.METRICS_FILE
    path.unlink() if content is None else path.write_text(content)
    metrics_log.mend(run)
    assert path.read_bytes() == (finished / metrics_log.METRICS_FILE).read_bytes()


def test_rows_without_digests_are_read_and_their_resumed_run_has_digests(finished, run, tmp_path):
    uninterrupted = TinyRun([*SCORES, 0.7, 0.8]).fit(tmp_path / "whole", LONGER)
    rewrite(run, lambda lines: lines)
    assert "digest" not in (run / metrics_log.METRICS_FILE).read_text()
    assert metrics_log.read_metrics(run) == metrics_log.read_metrics(finished)
    np.testing.assert_array_equal(TinyRun([0.7, 0.8]).fit(run, LONGER), uninterrupted)
    assert (run / metrics_log.METRICS_FILE).read_bytes() == (tmp_path / "whole" / metrics_log.METRICS_FILE).read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"dev_accuracy"', '"dev_accurac{"', "no dev_accuracy"),
        ("0.9", '"0.9"', "dev_accuracy = '0.9', expected a number"),
        ("0.9", "null", "dev_accuracy = None, expected a number"),
        ('"step": 10', '"step": "10"', "expected an object with a step"),
        ('"step": 10', '"step": true', "expected an object with a step"),
        ("{", "[", "Expecting"),
        ('"loss"', '"target_dev_scores": 3, "loss"', "target_dev_scores = 3, expected an object"),
        ('"loss"', '"target_dev_scores": {"de": "x"}, "loss"', "de = 'x', expected a number"),
        ('"loss"', '"\udcff"', "utf-8"),
    ],
)
def test_a_malformed_row_without_a_digest_is_restored_or_named_alone(run, tmp_path, old, new, fault):
    """The second row is of the best checkpoint. A checkpoint of an older version has a copy of the score alone."""
    path = run / metrics_log.METRICS_FILE

    def damaged(lines):
        return [lines[0], lines[1].replace(old, new), *lines[2:]]

    rewrite(run, lambda lines: lines)
    path.write_bytes(
        "".join(f"{line}\n" for line in damaged(path.read_text().splitlines())).encode(errors="surrogateescape")
    )
    for step in (10, 20):
        save_scores_as_before(run / "checkpoints" / str(step))
    assert read_dev_scores(run).source == {5: 0.5, 10: 0.9, 15: 0.3, 20: 0.6}
    shutil.rmtree(run / "checkpoints" / "10")
    with pytest.raises(UserError) as caught:
        read_dev_scores(run)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: this row is damaged (") and fault in message
    assert message.endswith("so none of them needs it: delete this line, and nothing else")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:1] + lines[2:]))
    assert selected_steps(run) == {"source_dev": 20, "last": 20}


def test_a_damaged_score_of_a_checkpoint_is_restored_from_the_rows(finished, run):
    """Here JSON with another digit, and then no JSON."""
    for step in ("10", "20"):
        path = run / "checkpoints" / step / "metrics" / "metrics"
        content = path.read_text()
        for other in (content.replace("0.", "0.0"), "{"):
            path.write_text(other)
            metrics_log.mend(run)
            assert path.read_text() == content
    assert files_of(run) == files_of(finished)


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_score_that_cannot_be_restored_costs_that_checkpoint_alone_and_only_when_asked(run):
    path = run / "checkpoints" / "10" / "metrics" / "metrics"
    path.write_text("{")
    rewrite(run, lambda lines: [line.replace("0.9", "0.95") for line in lines])  # not the score that was saved
    with pytest.raises(UserError, match="checkpoints/10: this checkpoint is damaged: metrics/metrics has") as caught:
        TinyRun([0.7, 0.8]).fit(run, LONGER)
    assert str(caught.value).endswith("; step 20 is whole: train with --from-earlier-step to remove step 10 alone")
    fall_back(run / "checkpoints")
    assert steps_on_disk(run) == [20]
    again = TinyRun([0.7, 0.8])
    again.fit(run, LONGER)
    assert again.batches == list(range(20, 30))


def test_patience_counts_rows_that_were_restored(finished, run):
    """Rows of deleted checkpoints count too, and the copies of the newest checkpoint have them."""
    patient = loop.Plan("test", steps=40, evaluations=8, seed=5, patience=4)
    rewrite(run, lambda lines: ["damaged", *lines[1:]], signed=True)
    TinyRun([0.6, 0.6]).fit(run, patient)
    rows = metrics_log.read_metrics(run)
    assert rows[:4] == metrics_log.read_metrics(finished)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30] and "stopped_early" in rows[-1]
