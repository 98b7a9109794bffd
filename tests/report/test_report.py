"""The report: its text, its chart, and its files."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.helpers import reported
from xtransfer import storage
from xtransfer.config import ExperimentConfig, TaskConfig
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.evaluation.results import Summary, aggregate
from xtransfer.evaluation.significance import Difference
from xtransfer.report import __main__ as report
from xtransfer.report import plot, summary, workdir_report
from xtransfer.report import table as table_writer
from xtransfer.runs.workdir import TaskRecord

REPOSITORY = Path(__file__).parents[2]
VALUES = {  # objective -> seed -> en, de, ja
    "teacher": {0: (0.9,)},
    "vanilla": {0: (0.70, 0.60, 0.60), 1: (0.74, 0.66, 0.56)},
    "monox_kd": {0: (0.82, 0.70, 0.66), 1: (0.80, 0.72, 0.60)},
}
TASK = TaskRecord("reviews", ("negative", "positive"), False, "en", ("de", "ja"), "abc", "def")
SYNTHETIC = dataclasses.replace(TASK, synthetic=True)
RECORD = json.loads(json.dumps(dataclasses.asdict(SYNTHETIC)))
ONE_SEED = {name: {0: by_seed[0]} for name, by_seed in VALUES.items()}


def make_rows(values=VALUES, **changes):
    return [
        {
            "task": "reviews",
            "objective": objective,
            "draw": "default",
            "seed": seed,
            "step": 100,
            "selection": "source_dev",
            "split": "test",
            "language": language,
            "metric": "accuracy",
            "value": value,
            "count": 1000,
        }
        | changes
        for objective, by_seed in values.items()
        for seed, row in by_seed.items()
        for language, value in zip(("en", "de", "ja"), row, strict=False)
    ]


def table(*rows, **settings):
    return aggregate(list(rows) or make_rows(), **{"source_languages": ("en",)} | settings)


def with_majority(rows, share=0.5):
    """Return the accuracy rows, and for each one a row with the share of the majority class."""
    return [*rows, *({**row, "metric": "majority_share", "value": share} for row in rows)]


def printed(rows, width=200, task=TASK):
    stream = io.StringIO()
    summary.show(table(*rows), Console(file=stream, width=width, highlight=False, soft_wrap=True), task)
    return stream.getvalue()


def test_cells_by_hand():
    # vanilla in English: 70 and 74, so sd 4/√2 = 2.8. Its averages are 60 and 61, so sd 0.7. The averages of
    # monox_kd are 68 and 66, so sd 1.4. The gains are 8 and 5: mean 6.5, sd 3/√2 = 2.1.
    header, lines = summary.cells(table())
    assert header == ["objective", "en (source)", "de", "ja", "avg of targets", "gain over vanilla"]
    assert lines == [
        ["teacher", "90.0", "–", "–", "–", "–"],
        ["vanilla", "72.0 ± 2.8", "63.0 ± 4.2", "58.0 ± 2.8", "60.5 ± 0.7", "–"],
        ["monox_kd", "81.0 ± 1.4", "71.0 ± 1.4", "63.0 ± 4.2", "67.0 ± 1.4", "+6.5 ± 2.1"],
    ]


def test_one_seed_has_no_standard_deviation():
    text = summary.markdown(table(*make_rows(ONE_SEED)), TASK)
    assert "| monox_kd | 82.0 | 70.0 | 66.0 | 68.0 | +8.0 |" in text
    assert "±" not in text
    assert "1 seed (0), one run each, spread unknown." in text
    assert "All seeds share" not in text


def test_the_caption_describes_the_measurement():
    text = "\n".join(summary.caption(table(), TASK))
    for phrase in (
        "accuracy in % on the test split of reviews, 2 classes, 1,000 examples per language.",
        "best on the source language's dev split (source_dev)",
        "teacher: 1 seed (0)",
        "vanilla, monox_kd: 2 seeds (0, 1), mean ± sample standard deviation",
        "mean over de, ja, without the source language en",
        "vanilla with the same seed",
        "All seeds share one labelled sample, one unlabelled sample, and one monolingual teacher",
    ):
        assert phrase in text
    oracle = table(*make_rows(selection="target_dev"), selection="target_dev")
    assert "not zero-shot" in "\n".join(summary.caption(oracle, TASK))


def test_the_caption_with_different_counts_and_without_a_baseline():
    rows = [row | {"count": 500} if row["language"] == "ja" else row for row in make_rows()]
    assert "examples: en 1,000, de 1,000, ja 500" in summary.caption(table(*rows), TASK)[0]
    no_baseline = table(*make_rows({"monox_kd": VALUES["monox_kd"]}))
    assert summary.cells(no_baseline)[0][-1] == "avg of targets"
    assert "Gain" not in "\n".join(summary.caption(no_baseline, TASK))


def test_a_synthetic_task_is_always_called_synthetic():
    text = summary.markdown(table(), SYNTHETIC)
    assert text.count("reviews") == text.count("reviews (synthetic)") == 2
    assert "synthetic" not in summary.markdown(table(), TASK)


def test_results_at_chance_are_named_in_one_line():
    values = {"vanilla": {0: (0.7, 0.51, 0.6), 1: (0.7, 0.6, 0.48)}}
    rows = with_majority(make_rows(values))
    chance = summary.warnings(table(*rows))
    assert chance == ["Warning: no better than the majority class: vanilla in de (1 of 2 seeds), ja (1 of 2 seeds)."]
    assert f"**{chance[0]}**" in summary.markdown(table(*rows), TASK)
    assert "no better than the majority class: vanilla in de (1 of 2 seeds), ja (1 of 2 seeds)." in printed(rows)
    assert summary.warnings(table(*with_majority(make_rows(values), share=0.25))) == []
    assert summary.warnings(table(*make_rows(values))) == []
    assert summary.warnings(table(*with_majority(make_rows()))) == []
    assert summary.warnings(table(*with_majority(make_rows(), share=0.9))) == [
        "Warning: no better than the majority class: teacher in en; "
        "vanilla in en (2 of 2 seeds), de (2 of 2 seeds), ja (2 of 2 seeds); "
        "monox_kd in en (2 of 2 seeds), de (2 of 2 seeds), ja (2 of 2 seeds)."
    ]


def test_a_constant_prediction_is_named_in_every_language():
    """A model that predicts one class only has exactly the accuracy of the majority class."""
    rows = with_majority(make_rows({"vanilla": {0: (0.6, 0.6, 0.6)}}), share=0.6)
    assert summary.warnings(table(*rows)) == ["Warning: no better than the majority class: vanilla in en, de, ja."]


def test_many_results_at_chance_stay_one_readable_line():
    base = with_majority(make_rows({"vanilla": {0: (0.5, 0.5, 0.5)}}))
    rows = [row for row in base if row["language"] == "en"]
    rows += [row | {"language": f"l{i:02}"} for row in base if row["language"] == "de" for i in range(20)]
    names = ", ".join(["en", *(f"l{i:02}" for i in range(7))])
    assert summary.warnings(table(*rows)) == [
        f"Warning: no better than the majority class: vanilla in {names} and 13 more languages."
    ]


def difference(by_seed, interval, p):
    """Return the paired difference on average over target languages."""
    mean = sum(by_seed) / len(by_seed)
    values = Summary(dict(enumerate(by_seed)))
    return Difference(None, 2000, mean, 0, None, None, values, interval, p, None, None)


def test_an_objective_of_your_own_has_its_place_and_the_headline():
    own = {"control": dataclasses.replace(OBJECTIVES["self_training"], name="control")}
    own["mix"] = dataclasses.replace(OBJECTIVES["monox_kd"], name="mix")
    rows = make_rows({"mix": VALUES["monox_kd"], "vanilla": VALUES["vanilla"], "control": VALUES["monox_kd"]})
    # Gains of both are 8 and 5, but `control` has no monolingual teacher.
    defined = table(*rows, objectives={**OBJECTIVES, **own})
    assert [line.objective for line in defined.lines] == ["vanilla", "control", "mix"]
    assert [None if line.gain is None else round(line.gain.mean, 6) for line in defined.lines] == [None, 0.065, 0.065]
    assert summary.headline(defined).startswith("mix makes no clear difference to zero-shot accuracy: +6.5 points")
    assert summary.headline(table(*rows)) is None  # nobody knows what they are


def test_headline_by_hand():
    # Gains 8 and 5: mean 6.5, sd 2.1213. With one degree of freedom t = 12.706, so the half width is 19.06.
    assert summary.headline(table()) == (
        "monox_kd makes no clear difference to zero-shot accuracy: +6.5 points over direct fine-tuning (vanilla), "
        "95 % interval -12.6 to 25.6 over 2 seeds; one labelled sample and one teacher; test items are not included."
    )
    # Gains 8, 7 and 9: mean 8, sd 1. With two degrees of freedom t = 4.3027, so the half width is 2.48.
    values = {
        "vanilla": {seed: (0.7, 0.6, 0.6) for seed in range(3)},
        "monox_kd": {0: (0.8, 0.68, 0.68), 1: (0.8, 0.67, 0.67), 2: (0.8, 0.69, 0.69)},
    }
    assert summary.headline(table(*make_rows(values))) == (
        "monox_kd raises zero-shot accuracy by 8.0 points over direct fine-tuning (vanilla): "
        "95 % interval 5.5 to 10.5 over 3 seeds; one labelled sample and one teacher; test items are not included."
    )
    # The same as a loss, with another metric, and selected by an oracle.
    swapped = {"vanilla": values["monox_kd"], "monox_kd": values["vanilla"]}
    rows = make_rows(swapped, metric="macro_f1", selection="target_dev")
    assert summary.headline(table(*rows, metric="macro_f1", selection="target_dev")) == (
        "monox_kd lowers oracle macro_f1 by 8.0 points over direct fine-tuning (vanilla): "
        "95 % interval 5.5 to 10.5 over 3 seeds; one labelled sample and one teacher; test items are not included."
    )
    assert summary.headline(table(*make_rows({"monox_kd": VALUES["monox_kd"]}))) is None
    rows = make_rows({"vanilla": VALUES["vanilla"], "self_training": VALUES["monox_kd"]})
    assert summary.headline(table(*rows)) is None


def test_the_headline_follows_the_paired_interval():
    """Three seeds may agree on a gain that other test items would not show."""
    values = {
        "vanilla": {seed: (0.7, 0.6, 0.6) for seed in range(3)},
        "monox_kd": {seed: (0.8, 0.625, 0.625) for seed in range(3)},
    }
    results = table(*make_rows(values))
    unclear = {"monox_kd": difference((0.025,) * 3, (-0.017, 0.067), 0.331)}
    assert summary.headline(results, unclear) == (
        "monox_kd makes no clear difference to zero-shot accuracy: +2.5 points over direct fine-tuning (vanilla), "
        "95 % interval -1.7 to 6.7 over test items and 3 seeds; one labelled sample and one teacher; p = 0.331."
    )
    clear = {"monox_kd": difference((0.025,) * 3, (0.011, 0.039), 0.0004)}
    assert summary.headline(results, clear) == (
        "monox_kd raises zero-shot accuracy by 2.5 points over direct fine-tuning (vanilla): "
        "95 % interval 1.1 to 3.9 over test items and 3 seeds; one labelled sample and one teacher; p < 0.001."
    )
    loss = {"monox_kd": difference((-0.025,) * 3, (-0.039, -0.011), 0.0004)}
    assert summary.headline(results, loss) == (
        "monox_kd lowers zero-shot accuracy by 2.5 points over direct fine-tuning (vanilla): "
        "95 % interval 1.1 to 3.9 over test items and 3 seeds; one labelled sample and one teacher; p < 0.001."
    )
    assert "95 % interval 1.1 to 3.9 over test items" in summary.markdown(results, TASK, clear)


def test_one_run_raises_nothing():
    results = table(*make_rows(ONE_SEED))
    assert summary.headline(results) == (
        "monox_kd has 8.0 points more zero-shot accuracy than direct fine-tuning (vanilla) in one run; other seeds and "
        "test items are not included."
    )
    paired = {"monox_kd": difference((0.08,), (0.05, 0.11), 0.0002)}
    assert summary.headline(results, paired) == (
        "monox_kd has 8.0 points more zero-shot accuracy than direct fine-tuning (vanilla) in one run: 95 % interval "
        "5.0 to 11.0 over test items; other seeds are not included."
    )
    paired = {"monox_kd": difference((-0.02,), (-0.05, 0.01), 0.2)}
    assert summary.headline(results, paired) == (
        "monox_kd has 2.0 points less zero-shot accuracy than direct fine-tuning (vanilla) in one run: 95 % interval "
        "-1.0 to 5.0 over test items; other seeds are not included."
    )


def test_the_direction_of_the_metric_is_named():
    values = {
        "vanilla": {seed: (0.1, 0.1, 0.1) for seed in range(3)},
        "monox_kd": {0: (0.1, 0.18, 0.18), 1: (0.1, 0.17, 0.17), 2: (0.1, 0.19, 0.19)},
    }
    results = table(*make_rows(values, metric="ece"), metric="ece")
    text = summary.headline(results)
    assert text is not None and text.startswith("monox_kd raises zero-shot ece (lower is better) by 8.0 points over")
    assert summary.cells(results)[0][-1] == "minus vanilla (lower is better)"
    assert "Minus vanilla: avg of targets minus the one of vanilla with the same seed, in points; lower is better." in (
        summary.caption(results, TASK)
    )


def test_the_legend_says_what_the_numbers_are():
    assert summary.legend(table()) == (
        "in %, mean ± sd over 2 seeds; one labelled sample and one teacher; 1,000 examples per language; "
        "checkpoint: best on the source language's dev split"
    )
    rows = [row | {"count": 500} if row["language"] == "ja" else row for row in make_rows(ONE_SEED)]
    assert summary.legend(table(*rows)).startswith("in %, one seed; 500 to 1,000 examples per language; ")
    assert summary.legend(table()) in printed(make_rows())


def test_caveats_are_one_line():
    assert summary.caveats(table(*make_rows(ONE_SEED)), TASK) == ""
    text = summary.caveats(table(), SYNTHETIC)
    assert text == (
        "Caveats: the text is synthetic, so the numbers say nothing about real languages; "
        "all seeds share one labelled sample and one teacher."
    )


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_printed_table_loses_no_digit_on_a_narrow_terminal(width):
    text = printed(make_rows(), width)
    header, rows = summary.cells(table())
    if width < 90:  # the rows of objectives would be 89 characters wide
        rows = list(zip(header, *rows, strict=True))[1:]
    for row in rows:
        words = " ".join(row)
        assert any(" ".join(line.split()) == words for line in text.splitlines()), words
    assert "…" not in text


def test_twelve_languages_fit_into_80_columns():
    languages = tuple(f"lan_{i:02}xx" for i in range(12))
    rows = [
        row | {"language": language, "value": row["value"] - i / 100}
        for row in make_rows({name: VALUES["vanilla"] for name in ("vanilla", "monox_kd", "monox_pl", "self_training")})
        if row["language"] == "de"
        for i, language in enumerate(languages)
    ]
    rows += make_rows({name: VALUES["vanilla"] for name in ("vanilla", "monox_kd", "monox_pl", "self_training")})
    rows = [row for row in rows if row["language"] not in ("de", "ja")]
    grid = summary.grid(table(*rows), TASK, width=80)
    assert table_writer.width(grid) <= 80
    assert [row[0] for row in grid.rows] == ["en (source)", *languages, "avg of targets", "gain over vanilla"]
    assert grid.header == ("language", "vanilla", "monox_kd", "monox_pl", "self_training")
    assert "| lan_03xx | 60.0 ± 4.2 |" in summary.markdown(table(*rows), TASK)


def test_square_brackets_are_no_markup_and_bars_no_columns():
    rows = make_rows(task="[red]x[/red]") + make_rows({"a|b": VALUES["vanilla"]}, task="[red]x[/red]")
    assert "[red]x[/red]: accuracy on test" in printed(rows)
    assert "| a\\|b | " in summary.markdown(table(*rows), TASK)


def test_a_missing_language_is_an_error():
    with pytest.raises(UserError, match="monox_kd seed 1 has no test accuracy in ja"):
        printed(make_rows()[:-1])


@pytest.mark.parametrize("values", [VALUES, ONE_SEED])
def test_the_plot_is_a_readable_png_and_deterministic(values):
    from matplotlib.image import imread

    picture = plot.plot(table(*make_rows(values)), TASK)
    image = imread(io.BytesIO(picture))[..., :3]
    assert image.shape[0] >= 600 and image.shape[1] >= 1000
    for colour in ("#999999", "#0072B2", "#333333"):  # baseline, first objective and teacher are all drawn
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(image - rgb).max(axis=-1) < 0.02).sum() > 1000, colour
    assert plot.plot(table(*make_rows(values)), TASK) == picture
    assert plot.plot(table(*with_majority(make_rows(values))), TASK) != picture, "the majority share is drawn as a line"


def make_workdir(root, rows, splits=("test",), targets=("de", "ja")):
    root.mkdir(parents=True)
    config = dataclasses.replace(ExperimentConfig(), task=TaskConfig(), evaluation_splits=splits)
    (root / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (root / "task.json").write_text(json.dumps(RECORD | {"target_languages": list(targets)}))
    (root / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_the_command_reports_every_workdir(tmp_path):
    first = make_workdir(tmp_path / "a", make_rows())
    second = make_workdir(tmp_path / "b", make_rows(ONE_SEED))
    command = [sys.executable, "-m", "xtransfer.report", "--workdir", str(first), str(second)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert (result.returncode, result.stderr) == (0, "")
    assert "+6.5 ± 2.1" in result.stdout and "+8.0" in result.stdout
    for root, gain in ((first, "+6.5 ± 2.1"), (second, "+8.0")):
        assert gain in (root / "report" / "results.md").read_text()
        assert "reviews (synthetic), 2 classes" in (root / "report" / "results.md").read_text()
        assert (root / "report" / "results.png").read_bytes().startswith(b"\x89PNG")
        names = sorted(path.name for path in (root / "report").iterdir())
        assert names == ["report.html", "results.md", "results.png"]


def test_the_command_fails_with_one_line(tmp_path):
    root = make_workdir(tmp_path / "a", make_rows())
    with (root / "results.jsonl").open("a") as file:
        file.write('{"value": NaN}\n')
    command = [sys.executable, "-m", "xtransfer.report", "--workdir", str(root)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert result.returncode == 3
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "results.jsonl:14: not strict JSON: NaN" in result.stderr
    assert not (root / "report").exists()


def test_flags_select_rows(tmp_path, capsys):
    other = [row | {"value": 0.25} for row in make_rows(metric="macro_f1", split="dev", selection="last")]
    root = make_workdir(tmp_path / "a", make_rows() + other)
    report.main(["--workdir", str(root), "--metric", "macro_f1", "--split", "dev", "--selection", "last"])
    names = sorted(path.name for path in (root / "report").iterdir())
    assert names == [
        f"{stem}-macro_f1-dev-last.{x}" for stem, x in (("report", "html"), ("results", "md"), ("results", "png"))
    ]
    text = (root / "report" / "results-macro_f1-dev-last.md").read_text()
    assert "macro_f1 in % on the dev split" in text and "last checkpoint (last)" in text
    assert "| vanilla | 25.0 ± 0.0 |" in text


def test_a_target_language_that_no_run_has_is_an_error(tmp_path):
    root = make_workdir(tmp_path / "a", make_rows(), targets=("de", "fr"))
    with pytest.raises(UserError, match="vanilla seed 0 has no test accuracy in fr"):
        report.main(["--workdir", str(root)])


def test_a_workdir_without_results_says_what_to_run(tmp_path):
    root = make_workdir(tmp_path / "a", [])
    with pytest.raises(UserError, match="no results"):
        report.main(["--workdir", str(root)])
    (root / "results.jsonl").unlink()
    with pytest.raises(UserError, match="run python -m xtransfer.evaluate first"):
        report.main(["--workdir", str(root)])


@pytest.mark.parametrize(("splits", "expected"), [(("dev", "test"), "test"), (("dev",), "dev"), (("test",), "test")])
def test_the_default_split_is_test_if_it_was_evaluated(tmp_path, splits, expected):
    rows = [row for split in splits for row in make_rows(split=split)]
    root = make_workdir(tmp_path / "a", rows, splits=splits)
    report.main(["--workdir", str(root)])
    assert f"accuracy in % on the {expected} split" in (root / "report" / "results.md").read_text()


def test_a_protocol_without_rows_lists_the_available_ones(tmp_path):
    root = make_workdir(tmp_path / "a", make_rows() + make_rows(selection="last"))
    with pytest.raises(UserError, match=r"selected by target_dev; .* split test; selection last, source_dev$"):
        report.main(["--workdir", str(root), "--selection", "target_dev"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: start the experiment again with python -m xtransfer.main"),
        ("{", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        (RECORD | {"labels": ["a"]}, "expected two or more labels"),
        (RECORD | {"labels": "ab"}, "labels = 'ab', expected a list of names"),
        (RECORD | {"labels": ["a", 1]}, "labels = "),
        (RECORD | {"target_languages": "de"}, "target_languages = 'de', expected a list of names"),
        (RECORD | {"synthetic": None}, "expected two or more labels, and synthetic as true or false"),
        (RECORD | {"synthetic": 1}, "expected two or more labels, and synthetic as true or false"),
    ],
)
def test_a_missing_or_broken_task_record_is_a_one_line_error(tmp_path, content, message):
    root = make_workdir(tmp_path / "a", make_rows())
    if content is None:
        (root / "task.json").unlink()
    else:
        text = json.dumps(content) if isinstance(content, dict) else content
        (root / "task.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"task.json: {message}") as caught:
        report.main(["--workdir", str(root)])
    assert "\n" not in str(caught.value) and not (root / "report").exists()


def test_an_unwritable_report_directory_is_named(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(UserError, match="report/results.md cannot be written"):
        workdir_report.write(table(), tmp_path / "report", TASK)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$$", "$x_$", "日本語", "\N{PILE OF POO}", "x" * 200, "a_b^c"])
def test_an_odd_language_is_drawn_without_a_warning(name):
    rows = [row | {"language": name if row["language"] == "de" else row["language"]} for row in make_rows()]
    assert plot.plot(table(*rows), TASK).startswith(b"\x89PNG")


def test_a_character_that_the_font_lacks_is_drawn_as_its_code():
    assert plot.drawable("de-日") == "de-\\u65e5"
    assert plot.drawable("é_$") == "é_$"
    assert plot.drawable("x" * 25) == "x" * 23 + "…"


def test_many_languages_are_drawn_as_their_average():
    names = [f"l{i:03}" for i in range(420)]
    base = [row for row in make_rows({"vanilla": VALUES["vanilla"]}) if row["language"] in ("en", "de")]
    rows = [row for row in base if row["language"] == "en"]
    rows += [row | {"language": name} for row in base if row["language"] == "de" for name in names]
    from matplotlib.image import imread

    height, width = imread(io.BytesIO(plot.plot(table(*rows), TASK))).shape[:2]
    assert width < 2000 and height < 2000
    assert len(summary.grid(table(*rows), TASK, width=80).rows) == 1 + 420 + 1


def test_a_picture_or_table_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("two\nlines")

    root = make_workdir(tmp_path / "a", make_rows())
    report.main(["--workdir", str(root)])
    monkeypatch.setattr(plot, "plot", fail)
    monkeypatch.setattr(summary, "show", fail)
    report.main(["--workdir", str(root)])
    output = " ".join(capsys.readouterr().out.split())
    assert "results.png cannot be drawn (two lines);" in output and "the table cannot be printed (two lines);" in output
    assert sorted(path.name for path in (root / "report").iterdir()) == ["report.html", "results.md"]


def test_a_home_directory_that_cannot_be_written_costs_no_word(tmp_path):
    workdir = reported.workdir(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key not in ("MPLCONFIGDIR", "XDG_CONFIG_HOME")}
    command = [sys.executable, "-m", "xtransfer.report", "--workdir", workdir.root]
    result = subprocess.run(
        command, env=environment | {"HOME": "/proc/1/none"}, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, ""), result


def test_damaged_predictions_are_named_and_a_missing_run_is_counted(tmp_path, capsys):
    workdir = reported.workdir(tmp_path)
    rows = [json.loads(line) for line in workdir.results.read_text().splitlines()]
    storage.write_jsonl(workdir.results, [r for r in rows if (r["objective"], r["seed"]) != ("monox_kd", 1)])
    workdir_report.report(workdir)
    text = capsys.readouterr().out
    assert "warning" not in text
    assert "mean ± sd over 2 seeds; one labelled sample and one teacher (monox_kd has 1; gains are over those" in text
    path = workdir.predictions(workdir.student("monox_kd", 0), 50, "test", "de")
    path.write_bytes(path.read_bytes()[:-20])
    workdir_report.report(workdir)
    assert re.search(r"warning: .* cannot be compared: \S+test-de\.jsonl:", capsys.readouterr().out)


def test_flags_that_would_be_ignored_are_refused(tmp_path):
    for flags in (["--compare", "a", "b"], ["--output", str(tmp_path)], ["--selection", "last"]):
        with pytest.raises(UserError, match="^--protocols compares all protocols: leave out"):
            report.main(["--workdir", str(tmp_path), "--protocols", *flags])
