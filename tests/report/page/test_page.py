"""The page: its parts, its numbers, and what it does without a source."""

import dataclasses
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.helpers import reported
from xtransfer import storage
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.evaluation.calibration import equal_width_bins, expected_error
from xtransfer.evaluation.results import read_rows
from xtransfer.report import __main__ as command
from xtransfer.report.page import page as pages
from xtransfer.report.page.page import PARTS, Part, page
from xtransfer.report.page.parts.costs import duration
from xtransfer.report.page.parts.examples import disagreements
from xtransfer.report.page.parts.predictions import class_scores
from xtransfer.report.page.parts.results import interval_of, mark
from xtransfer.report.page.parts.transfer import gap
from xtransfer.report.page.sources import MissingSource, Predictions, read_predictions
from xtransfer.report.workdir_report import report
from xtransfer.runs.workdir import RunId, Workdir

VOID = {"meta", "br"}


class _Document(HTMLParser):
    """A strict reader: every element is closed in its order. Collects text by section, attributes, and elements."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.sections, self.attributes, self.names, self.data = [], {}, [], set(), ""
        self._section = ""
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, name, attributes):
        self.names.add(name)
        self.attributes += [(name, key, value) for key, value in attributes]
        if name not in VOID:
            self.stack.append(name)
        if name == "section":
            self._section = dict(attributes)["id"]
            assert self._section not in self.sections
            self.sections[self._section] = ""

    def handle_endtag(self, name):
        assert self.stack.pop() == name
        if name == "section":
            self._section = ""

    def handle_data(self, data):
        self.data += data
        if self._section:
            self.sections[self._section] += data


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return reported.workdir(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def source(workdir):
    return report(workdir)


@pytest.fixture(scope="module")
def written(source, workdir):
    return (workdir.root / "report" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(written):
    return _Document(written)


def copied(workdir, root):
    """Return a copy of a workdir, without its report."""
    shutil.copytree(workdir.root, root / "copy", ignore=shutil.ignore_patterns("report"))
    return Workdir(root / "copy")


def test_every_part_is_there(document):
    assert list(document.sections) == list(PARTS)
    assert "Left out" not in document.data
    for anchor, part in PARTS.items():
        assert document.sections[anchor].startswith(part.title)
        assert ("a", "href", f"#{anchor}") in document.attributes


def test_the_page_needs_nothing_else_and_runs_nothing(written, document):
    assert not document.names & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    values = [(key, value) for _, key, value in document.attributes]
    assert all(value.startswith("#") for key, value in values if key in ("href", "src", "action", "data", "xlink:href"))
    assert not [key for key, _ in values if key.startswith("on")]
    assert "url(" not in written and "@import" not in written and "://" not in written
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in document.attributes


def test_names_and_texts_are_inert(written, document):
    assert "<script" not in written and "<b>gewann" not in written
    assert reported.LABELS[0] in document.sections["confusions"]
    assert "unsere Mannschaft <b>gewann</b>" in document.sections["examples"]


def test_texts_state_their_language_and_direction(written):
    assert '<p dir="auto" lang="ar">فاز فريقنا بالمباراة' in written
    assert '<p dir="auto" lang="ja">銀行は金利を引き上げた' in written


def test_the_numbers_are_the_results(workdir, source, document):
    text = document.sections["results"]
    chosen = ("source_dev", "accuracy")
    rows = [row for row in read_rows(workdir.results) if (row["selection"], row["metric"]) == chosen]
    for objective in ("vanilla", "monox_kd"):
        for language in ("en", "de", "ar", "ja"):
            values = [r["value"] for r in rows if (r["objective"], r["language"]) == (objective, language)]
            assert f"{np.mean(values) * 100:.1f} ± {np.std(values, ddof=1) * 100:.1f}" in text
    averages = {
        objective: np.mean([r["value"] for r in rows if r["objective"] == objective and r["language"] != "en"])
        for objective in ("vanilla", "monox_kd")
    }
    gain = (averages["monox_kd"] - averages["vanilla"]) * 100
    assert f"monox_kd raises zero-shot accuracy by {gain:.1f} points" in document.data
    average = source.comparisons["monox_kd"].differences[None]
    low, high = (bound * 100 for bound in average.interval)
    assert f"95 % interval {low:.1f} to {high:.1f} over test items and 2 seeds; one labelled sample" in document.data
    assert document.data.count("95 % interval ") == 3, "one in the header, and one in the caption of each table"
    difference = source.comparisons["monox_kd"].differences["ar"]
    low, high = (bound * 100 for bound in difference.interval)
    assert f"{difference.mean * 100:+.1f}{mark(difference.p_holm)}{low:+.1f} to {high:+.1f}" in text


def test_the_other_numbers_are_the_records(workdir, source, document):
    tally = source.tallies["vanilla", "de"]
    parts = [source.predictions("vanilla", RunId("default", seed), "de") for seed in (0, 1)]
    gold, guesses = (np.concatenate([getattr(part, key) for part in parts]) for key in ("gold", "guesses"))
    by_hand = [[np.sum((gold == i) & (guesses == j)) for j in (0, 1)] for i in (0, 1)]
    assert tally.confusion.tolist() == by_hand and tally.runs == 2
    errors = [expected_error(equal_width_bins(part.logits, part.gold)) for part in parts]
    assert f"{np.mean(errors) * 100:.1f}" in document.sections["calibration"]
    assert f"{by_hand[0][0] / sum(by_hand[0]) * 100:.0f}" in document.sections["confusions"]
    # Five runs of 2.5 s with 100 examples each, of which the teacher is one.
    assert "students4" + "10.0 s" + "400" + "40" + "75%" in document.sections["costs"]
    assert "total12.5 s" in document.sections["costs"]
    assert "1.38" in document.sections["transfer"] and "1.62*" in document.sections["transfer"]  # 110 / 80, 130 / 80
    assert "python -m xtransfer.main --config 'a&b.py'" in document.sections["reproduction"]
    assert (
        "e" * 64 in document.sections["reproduction"] and '"source_language": "en"' in document.sections["reproduction"]
    )
    assert "monox_kd" + "KL(the teacher's logits; T = 1) on" in document.sections["reproduction"]
    assert "step 50" in document.sections["protocols"] and "step 100" in document.sections["protocols"]


def test_an_objective_of_your_own_is_the_main_one_if_it_has_a_monolingual_teacher(source):
    control, mix = (dataclasses.replace(OBJECTIVES["self_training"], name=name) for name in ("monox_kd", "mix"))
    unknown = dataclasses.replace(source.results, objectives={"monox_kd": control})
    assert dataclasses.replace(source, results=unknown).main_objective == "monox_kd"  # the last one
    taught = {"vanilla": dataclasses.replace(mix, teacher="monolingual")}
    known = dataclasses.replace(source.results, objectives=taught)
    assert dataclasses.replace(source, results=known).main_objective == "vanilla"


@pytest.mark.parametrize(
    ("path", "anchor", "sentence"),
    [
        ("predictions", "calibration", "The workdir has no test-en.jsonl"),
        ("costs.jsonl", "costs", "Left out: The workdir has no costs.jsonl"),
        ("starts.jsonl", "reproduction", "The workdir has no starts.jsonl"),
        ("tokens.jsonl", "transfer", "The workdir has no tokens.jsonl"),
        ("../data", "examples", "Left out: The task's data cannot be read"),
    ],
)
def test_a_missing_source_is_one_sentence(tmp_path, path, anchor, sentence, capsys):
    workdir = reported.workdir(tmp_path, count=12)
    target = workdir.root / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    report(workdir)
    document = _Document((workdir.root / "report" / "report.html").read_text(encoding="utf-8"))
    assert sentence in document.sections[anchor] and list(document.sections) == list(PARTS)
    # The sentence above the table needs predictions, so their absence costs one line.
    assert capsys.readouterr().out.count("warning") == (path == "predictions")


def test_changed_data_are_not_shown(tmp_path):
    workdir = reported.workdir(tmp_path, count=12)
    path = tmp_path / "data" / "ja" / "test.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], *lines[:0:-1], ""]), encoding="utf-8")
    report(workdir)
    document = _Document((workdir.root / "report" / "report.html").read_text(encoding="utf-8"))
    assert "The task's data have changed since the evaluation" in document.sections["examples"]


def test_a_failing_part_costs_a_warning_and_a_sentence(source, monkeypatch, capsys):
    def fail(_):
        raise ZeroDivisionError("oh\nno <b>")

    monkeypatch.setattr(pages, "PARTS", {**PARTS, "costs": Part("Costs", fail)})
    document = _Document(page([source]))
    assert "Left out, because it failed: oh no <b>." in document.sections["costs"]
    assert "the part 'Costs' of the page failed (oh no <b>)" in " ".join(capsys.readouterr().out.split())
    assert "Left out" not in document.sections["reproduction"]


def test_a_page_that_fails_costs_a_warning(workdir, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise ValueError("no")

    monkeypatch.setattr("xtransfer.report.workdir_report.page", fail)
    copy = copied(workdir, tmp_path)
    report(copy)
    assert sorted(path.name for path in (copy.root / "report").iterdir()) == ["results.md", "results.png"]
    assert "report.html cannot be made (no)" in " ".join(capsys.readouterr().out.split())


def test_several_workdirs_share_a_page_with_an_overview(workdir, tmp_path):
    copy = copied(workdir, tmp_path)
    command.main(["--workdir", str(workdir.root), str(copy.root), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    document = _Document(text)
    assert list(document.sections) == ["overview", *(f"run{i}-{anchor}" for i in (0, 1) for anchor in PARTS)]
    assert "copy" in document.sections["overview"] and document.sections["overview"].count("files") == 2
    identifiers = [value for _, key, value in document.attributes if key == "id"]
    links = [value for _, key, value in document.attributes if key == "href"]
    assert len(identifiers) == len(set(identifiers)) and set(links) <= {f"#{name}" for name in identifiers}


def test_several_teachers_have_an_interval_over_draws(workdir, tmp_path):
    """One teacher is right on all items, one on half: Student's t of two values, 12.7 · 0.35 / √2, exceeds 0 to 1."""
    copy = copied(workdir, tmp_path)
    rows = read_rows(copy.results)
    teachers = [row for row in rows if row["objective"] == "teacher"]
    for draw, right in (("default", 40), ("sample-1-teacher-0", 20)):
        for step in reported.STEPS.values():
            path = copy.predictions(copy.at(draw).teacher, step, "test", "en")
            lines = reported.read_predictions(workdir, step)
            for number, line in enumerate(lines):
                other = next(label for label in reported.LABELS if label != line["label"])
                line["prediction"] = line["label"] if number < right else other
            storage.write_jsonl(path, lines)
    storage.write_jsonl(copy.results, [*rows, *(row | {"draw": "sample-1-teacher-0"} for row in teachers)])
    source = report(copy)
    assert interval_of(source, {}, "teacher", "en") == (0, 1)
    text = _Document((copy.root / "report" / "report.html").read_text(encoding="utf-8")).sections["results"]
    assert "0.0 to 100.0" in text and "Wilson" not in text


def test_output_and_compare_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="--output: a comparison is written to the workdir of A"):
        command.main(["--workdir", str(tmp_path), "--compare", "a", "b", "--output", str(tmp_path)])


def test_another_metric_has_no_intervals(workdir, tmp_path):
    copy = copied(workdir, tmp_path)
    report(copy, metric="macro_f1")
    document = _Document((copy.root / "report" / "report-macro_f1.html").read_text(encoding="utf-8"))
    assert "Intervals and tests exist for accuracy only" in document.sections["results"]


def test_hundreds_of_languages_are_all_in_the_tables(source):
    names = tuple(f"l{i:03}" for i in range(300))
    german = {line.objective: line.languages.get("de") for line in source.results.lines}
    lines = tuple(
        dataclasses.replace(line, languages={**line.languages, **{name: german[line.objective] for name in names}})
        if line.objective != "teacher"
        else line
        for line in source.results.lines
    )
    counts = {"en": 40, **dict.fromkeys(names, 40)}
    results = dataclasses.replace(source.results, target_languages=names, lines=lines, counts=counts)
    results = dataclasses.replace(results, metric="macro_f1")  # without tests, for which there are no predictions
    document = _Document(page([dataclasses.replace(source, results=results)]))
    assert all(name in document.sections["results"] for name in names)
    assert "59 of 300 target languages are drawn" in document.sections["results"]
    assert len(dataclasses.replace(source, results=results).shown_languages(6)) == 6


def test_every_part_shows_the_predictions_of_the_protocol(tmp_path):
    protocols = ("source_dev", "average", "target_dev")
    workdir = reported.workdir(tmp_path, protocols=protocols)
    for selection in protocols:
        source = report(workdir, selection=selection)
        for language in ("en", "de", "ar", "ja"):
            line = next(line for line in source.results.lines if line.objective == "vanilla")
            tally = source.tallies["vanilla", language]
            right = np.diag(tally.confusion).sum() / tally.confusion.sum()
            assert right == pytest.approx(line.languages[language].mean), (selection, language)
    # The oracle selects step 50 in one language and step 100 in the others.
    steps = source.steps("vanilla")[RunId("default", 0)]
    assert steps == {"en": 50, "de": 50, "ar": 100, "ja": 100}
    text = _Document(page([source])).sections["curves"]
    assert "the checkpoints that the results of one or more languages use" in text


def test_calibrated_errors_stand_under_the_errors(tmp_path):
    workdir = reported.workdir(tmp_path)
    rows = read_rows(workdir.results)
    chosen = [row for row in rows if (row["objective"], row["metric"]) == ("vanilla", "accuracy")]
    calibrated = [row | {"metric": "ece_calibrated", "value": 0.0125} for row in chosen]
    storage.write_jsonl(workdir.results, [*rows, *calibrated])
    text = _Document(page([report(workdir)])).sections["calibration"]
    assert text.count("1.2") >= 4 or text.count("1.3") >= 4, text
    assert "fitted on the source language's dev split" in text


def test_a_workdir_without_students_has_a_page(tmp_path, capsys):
    workdir = reported.workdir(tmp_path)
    storage.write_jsonl(workdir.results, [row for row in read_rows(workdir.results) if row["objective"] == "teacher"])
    text = page([report(workdir)])
    assert "There are no results of students yet." in text
    assert "warning" not in capsys.readouterr().err
    assert "There are" not in page([report(reported.workdir(tmp_path / "other")), report(workdir)]).split("<h1>")[1]


def test_a_metric_whose_lower_values_are_better_turns_the_order_and_the_gap(source):
    other = dataclasses.replace(source, results=dataclasses.replace(source.results, metric="ece"))
    first, second = (item.shown_languages(10) for item in (source, other))
    assert first[0] == second[0] == "en" and first[1:] == second[:0:-1]
    line = next(line for line in source.results.lines if line.objective == "vanilla")
    below = (line.languages["en"].mean - line.languages["de"].mean) * 100
    assert gap(source, "vanilla", "de") == pytest.approx(below) == pytest.approx(-gap(other, "vanilla", "de"))
    document = _Document(page([other]))
    assert "points above en" in document.sections["transfer"] and "points below" not in document.sections["transfer"]
    assert "minus vanilla (lower is better)" in document.sections["transfer"]
    assert "gain" not in document.sections["transfer"].replace("Gain and tokenization", "")


def test_class_scores_by_hand():
    # Class 0: 3 right of 4 gold and 5 predicted. Class 1: 4 of 6 and 5. Class 2 never occurs.
    scores = class_scores(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert np.allclose(scores, [[3 / 5, 4 / 5, 0], [3 / 4, 4 / 6, 0], [6 / 9, 8 / 11, 0]])


def test_disagreements_by_hand():
    def predictions(rows, ids=("a", "b", "c")):
        logits = np.array(rows, np.float32)
        return Predictions(ids, np.array([0, 1, 0]), logits.argmax(1), logits)

    first = predictions([[1, 0], [3, 0], [0, 9]])
    second = predictions([[0, 1], [0, 3], [0, 9]])
    found, total = disagreements(first, second)
    assert total == 3
    assert [(item.positions, item.ids, item.gold, item.guesses) for item in found] == [
        ((1, 1), ("b", "b"), 1, (0, 1)),
        ((0, 0), ("a", "a"), 0, (0, 1)),
    ]
    assert found[0].confidences == pytest.approx((1 / (1 + np.exp(-3)),) * 2)
    # Another language, another order, and an item that the first classifier has not read.
    translated = predictions([[0, 9], [0, 3], [0, 1]], ids=("files/test/de/b/1", "files/test/de/c", "files/test/de/x"))
    original = predictions([[3, 0], [1, 0], [0, 1]], ids=("files/test/en/c", "files/test/en/a", "files/test/en/b/1"))
    found, total = disagreements(original, translated)
    assert total == 2
    assert [(item.positions, item.ids, item.gold) for item in found] == [
        ((0, 1), ("files/test/en/c", "files/test/de/c"), 1)
    ]
    with pytest.raises(MissingSource):
        disagreements(first, predictions([[1, 0], [3, 0], [0, 9]], ids=("d", "e", "f")))


def test_malformed_predictions_are_named(tmp_path):
    path = tmp_path / "test-de.jsonl"
    good = {"id": "a", "label": "x", "prediction": "y", "logits": [0, 1]}
    for bad in ({"label": "z"}, {"logits": [1]}, {"logits": "no"}):
        storage.write_jsonl(path, [good, good | bad])
        with pytest.raises(UserError, match=r"test-de\.jsonl"):
            read_predictions(path, ("x", "y"))
    storage.write_jsonl(path, [good])
    assert read_predictions(path, ("x", "y")).guesses.tolist() == [1]


def test_small_formats_by_hand():
    assert [duration(seconds) for seconds in (2.54, 125, 7260)] == ["2.5 s", "2 min 05 s", "2 h 01 min"]
    assert [mark(p) for p in (0.0005, 0.005, 0.049, 0.05)] == ["***", "**", "*", ""]


def test_no_line_of_the_style_sheet_fetches_anything():
    style = (pages.Path(pages.__file__).with_name("style.css")).read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|http", style)
