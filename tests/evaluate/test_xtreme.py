"""Predictions for the XTREME benchmark: folders, file names, labels, and lines in the order of the test files."""

import numpy as np
import pytest

from xtransfer.data.corpora import paws_x, xnli
from xtransfer.data.task import Example, Task, example_id
from xtransfer.errors import UserError
from xtransfer.evaluate import xtreme
from xtransfer.evaluation.classifiers import LanguageResult


def task(name, labels):
    return Task(name, labels, "en", ("de",), lambda *_: [], lambda: "", False, lambda _: {}, lambda *_: [])


def result(name, language, ids, classes):
    """Return a result whose logits predict these classes."""
    examples = [Example(example_id(name, "test", language, i), "a", "b", 0, language) for i in ids]
    return LanguageResult(language, examples, np.eye(3, dtype=np.float32)[list(classes)], (), 0)


def test_xnli_has_the_names_of_the_labels_in_corpus_order(tmp_path, capsys):
    layout = xtreme.check("xnli", "test", tmp_path)
    results = [result("xnli", "en", "372", (0, 1, 2)), result("xnli", "de", "372", (2, 2, 0))]
    xtreme.export(tmp_path, layout, task("xnli", xnli.LABELS), results)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.tsv")}
    assert files == {
        "xnli/test-en.tsv": b"entailment\nneutral\ncontradiction\n",
        "xnli/test-de.tsv": b"contradiction\ncontradiction\nentailment\n",
    }
    out = capsys.readouterr().out
    assert "en has 3 lines, the benchmark 5,010" in out
    assert "the benchmark also scores ar, bg, el, es, fr, hi, ru, sw, th, tr, ur, vi, zh" in out


def test_pawsx_has_digits_and_a_line_for_each_pair_that_was_not_translated(tmp_path, capsys):
    (tmp_path / "xnli").mkdir()
    (tmp_path / "xnli" / "test-en.tsv").write_text("neutral\n")
    layout = xtreme.check("paws_x", "test", tmp_path)
    results = [result("paws_x", "en", "1234", (1, 0, 1, 1)), result("paws_x", "de", "3", (1,))]
    xtreme.export(tmp_path, layout, task("paws_x", paws_x.LABELS), results)
    assert (tmp_path / "pawsx" / "test-en.tsv").read_text() == "1\n0\n1\n1\n"
    assert (tmp_path / "pawsx" / "test-de.tsv").read_text() == "0\n0\n1\n0\n"
    assert "3 rows in de are not translated and get the label 0" in capsys.readouterr().out
    assert (tmp_path / "xnli" / "test-en.tsv").exists()


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("sib200", "test", "task 'sib200' is not one of xnli, paws_x"),
        ("xnli", "dev", "the benchmark scores test, not dev"),
        ("paws_x", "test", "pawsx already exists; choose another --export-xtreme"),
    ],
)
def test_what_the_benchmark_does_not_take_is_refused(tmp_path, name, split, message):
    (tmp_path / "pawsx").mkdir()
    (tmp_path / "pawsx" / "test-en.tsv").write_text("1\n")
    with pytest.raises(UserError, match=message):
        xtreme.check(name, split, tmp_path)


def test_an_id_that_counts_no_row_is_refused_and_leaves_nothing(tmp_path):
    layout = xtreme.check("paws_x", "test", tmp_path)
    with pytest.raises(UserError, match="paws_x/test/en/a: the id does not count rows from 1"):
        xtreme.export(tmp_path, layout, task("paws_x", paws_x.LABELS), [result("paws_x", "en", "a", (0,))])
    assert list(tmp_path.iterdir()) == []
