"""What is said inside stays inside, and what is said afterwards is heard."""

import logging
import sys

import pytest

from xtransfer.data.corpora.tfds_prepare import quiet


def test_nothing_is_shown_and_everything_is_as_before(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    absl = logging.getLogger("absl")
    level = absl.level
    with pytest.raises(KeyError), quiet():
        print("bar")
        print("bar", file=sys.stderr)
        absl.warning("a folder yet to be filled")
        logging.warning("the first warning of all")
        raise KeyError
    assert capsys.readouterr() == ("", "")
    logging.getLogger("xtransfer").warning("rows were left out")
    assert capsys.readouterr() == ("", "rows were left out\n")
    assert logging.root.handlers == [] and absl.level == level
