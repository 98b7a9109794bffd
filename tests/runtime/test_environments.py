"""A command in odd environments: no home, an unknown user, another umask or locale, output that cannot be written."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
PREDICT = """
{before}
from xtransfer.predict.__main__ import main
from xtransfer.runtime import terminal
terminal.run(main)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a directory with a classifier and a file of texts."""
    directory = tmp_path_factory.mktemp("files")
    tiny.roberta(directory / "model")
    (directory / "a.tsv").write_text("text\nle film très bon\n", encoding="utf-8")
    return directory


def predict(files, output, before="", redirection="", **environment):
    """Run predict in a shell, with changes to its environment; None removes a variable."""
    changed = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    command = f'"$0" "$@" {redirection}'
    arguments = ["--model", str(files / "model"), "--input", str(files / "a.tsv"), "--output", str(output)]
    return subprocess.run(
        ["sh", "-c", command, sys.executable, "-c", PREDICT.format(before=before), *arguments],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )


UNKNOWN_USER = """
import os, pwd
def unknown(uid): raise KeyError(uid)  # as for a user id of a container that /etc/passwd lacks
pwd.getpwuid = unknown
os.umask(0o077)
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        (UNKNOWN_USER, {**dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")), **ASCII}),
        ("", {"HOME": "/proc/1/none"}),
    ],
    ids=["no home, unknown user, umask, and locale", "read-only home"],
)
def test_an_odd_environment_costs_at_most_a_line(files, tmp_path, before, environment):
    result = predict(files, tmp_path / "labels.jsonl", before, **environment)
    assert result.returncode == 0 and result.stderr.count("\n") <= 1 and "Traceback" not in result.stderr, result
    assert '"label": ' in (tmp_path / "labels.jsonl").read_text(encoding="utf-8")
    if before:
        assert stat.S_IMODE((tmp_path / "labels.jsonl").stat().st_mode) == 0o600


@pytest.mark.parametrize(("redirection", "status"), [(">&- 2>&-", 0), (">/dev/full 2>/dev/full", 5)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_stops_no_command(files, tmp_path, redirection, status):
    result = predict(files, tmp_path / "labels.jsonl", redirection=redirection)
    assert result.returncode == status and "Traceback" not in result.stderr, result
    assert (tmp_path / "labels.jsonl").read_text(encoding="utf-8").count("\n") == 1
