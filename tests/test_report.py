"""What the report says, and the files it leaves."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from xtransfer import report
from xtransfer.config import ExperimentConfig, TaskConfig, to_json
from xtransfer.errors import UserError
from xtransfer.evaluation.statistics import aggregate

REPOSITORY = Path(__file__).parents[1]
VALUES = {  # objective -> seed -> en, de, ja
    "teacher": {0: (0.9,)},
    "vanilla": {0: (0.70, 0.60, 0.60), 1: (0.74, 0.66, 0.56)},
    "monox_kd": {0: (0.82, 0.70, 0.66), 1: (0.80, 0.72, 0.60)},
}
ONE_SEED = {name: {0: by_seed[0]} for name, by_seed in VALUES.items()}


def make_rows(values=VALUES, **changes):
    return [
        {
            "task": "reviews",
            "objective": objective,
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
    return aggregate(list(rows) or make_rows(), **{"source_language": "en"} | settings)


def printed(rows, width=200, **settings):
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, soft_wrap=True)
    report.print_table(rows, console, **{"source_language": "en"} | settings)
    return stream.getvalue()


def test_cells_by_hand():
    # English of vanilla: 70, 74: sd 4/√2 = 2.8. Its averages 60 and 61: sd 0.7; monox_kd's 68 and 66: sd 1.4.
    # Gains 8 and 5: mean 6.5, sd 3/√2 = 2.1.
    header, lines = report.cells(table())
    assert header == ["objective", "en (source)", "de", "ja", "avg of targets", "gain over vanilla"]
    assert lines == [
        ["teacher", "90.0", "–", "–", "–", "–"],
        ["vanilla", "72.0 ± 2.8", "63.0 ± 4.2", "58.0 ± 2.8", "60.5 ± 0.7", "–"],
        ["monox_kd", "81.0 ± 1.4", "71.0 ± 1.4", "63.0 ± 4.2", "67.0 ± 1.4", "+6.5 ± 2.1"],
    ]


def test_one_seed_has_no_sd_and_says_so():
    text = report.markdown(table(*make_rows(ONE_SEED)))
    assert "| monox_kd | 82.0 | 70.0 | 66.0 | 68.0 | +8.0 |" in text
    assert "±" not in text
    assert "1 seed (0), one run each, spread unknown." in text


def test_caption_says_what_was_measured():
    text = "\n".join(report.caption(table()))
    for words in (
        "accuracy in % on the test split of reviews, 1,000 items per language.",
        "best on the source language's dev split (source_dev)",
        "teacher: 1 seed (0)",
        "vanilla, monox_kd: 2 seeds (0, 1), mean ± sample standard deviation",
        "mean over de, ja, without the source language en",
        "vanilla with the same seed",
    ):
        assert words in text
    oracle = report.caption(table(*make_rows(selection="target_dev_oracle"), selection="target_dev_oracle"))
    assert "not zero-shot" in "\n".join(oracle)


def test_different_counts_and_no_baseline():
    rows = [row | {"count": 500} if row["language"] == "ja" else row for row in make_rows()]
    assert "items: en 1,000, de 1,000, ja 500" in report.caption(table(*rows))[0]
    alone = table(*make_rows({"monox_kd": VALUES["monox_kd"]}))
    assert report.cells(alone)[0][-1] == "avg of targets"
    assert "Gain" not in "\n".join(report.caption(alone))


def test_synthetic_text_is_called_synthetic_wherever_it_is_named():
    text = report.markdown(table(*make_rows(task="minireviews")))
    assert text.count("minireviews") == text.count("minireviews (synthetic)") == 2
    assert "synthetic" not in report.markdown(table())


def test_results_at_chance_are_named():
    values = {"vanilla": {0: (0.7, 0.51, 0.6), 1: (0.7, 0.6, 0.48)}}
    chance = report.warnings(table(*make_rows(values)), 2)
    assert chance == ["Warning: not above chance (50.0%): vanilla seed 0 in de (51.0%); vanilla seed 1 in ja (48.0%)."]
    assert f"**{chance[0]}**" in report.markdown(table(*make_rows(values)), 2)
    assert chance[0] in printed(make_rows(values), num_classes=2)
    assert report.warnings(table(*make_rows(values)), 4) == []
    assert report.warnings(table(*make_rows(values)), None) == []
    assert report.warnings(table(), 2) == []


@pytest.mark.parametrize("width", [40, 80, 200])
def test_printed_table_loses_no_digit_on_a_narrow_terminal(width):
    text = printed(make_rows(), width)
    for line in report.cells(table())[1]:
        words = " ".join(line)
        assert any(" ".join(found.split()) == words for found in text.splitlines()), words
    assert "…" not in text


def test_square_brackets_are_no_markup_and_bars_no_columns():
    rows = make_rows(task="[red]x[/red]") + make_rows({"a|b": VALUES["vanilla"]}, task="[red]x[/red]")
    assert "[red]x[/red]: accuracy on test" in printed(rows)
    assert "| a\\|b | " in report.markdown(table(*rows))


def test_missing_language_reaches_the_user():
    with pytest.raises(UserError, match="monox_kd seed 1 has no test accuracy in ja"):
        printed(make_rows()[:-1])


@pytest.mark.parametrize("values", [VALUES, ONE_SEED])
def test_plot_is_a_readable_png_and_the_same_twice(tmp_path, values):
    from matplotlib.image import imread

    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        report.plot(table(*make_rows(values)), path, num_classes=2)
    image = imread(paths[0])[..., :3]
    assert image.shape[0] >= 600 and image.shape[1] >= 1000
    for colour in ("#999999", "#0072B2", "#333333"):  # baseline, first objective and teacher are all drawn
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(image - rgb).max(axis=-1) < 0.02).sum() > 1000, colour
    assert paths[0].read_bytes() == paths[1].read_bytes()


def make_workdir(root, rows, labels=("negative", "positive"), **task):
    root.mkdir(parents=True)
    config = dataclasses.replace(ExperimentConfig(), task=TaskConfig(labels=labels, **task))
    (root / "config.json").write_text(to_json(config))
    (root / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_the_binary_reports_every_workdir(tmp_path):
    first = make_workdir(tmp_path / "a", make_rows())
    second = make_workdir(tmp_path / "b", make_rows(ONE_SEED))
    command = [sys.executable, "-m", "xtransfer.report", "--workdir", str(first), str(second)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "+6.5 ± 2.1" in done.stdout and "+8.0" in done.stdout
    for root, gain in ((first, "+6.5 ± 2.1"), (second, "+8.0")):
        assert gain in (root / "report" / "results.md").read_text()
        assert (root / "report" / "results.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(path.name for path in (root / "report").iterdir()) == ["results.md", "results.png"]


def test_the_binary_fails_with_one_line(tmp_path):
    root = make_workdir(tmp_path / "a", make_rows())
    with (root / "results.jsonl").open("a") as file:
        file.write('{"value": NaN}\n')
    command = [sys.executable, "-m", "xtransfer.report", "--workdir", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "results.jsonl:14: not strict JSON: NaN" in done.stderr
    assert not (root / "report").exists()


def test_options_choose_rows(tmp_path, capsys):
    other = [row | {"value": 0.25} for row in make_rows(metric="macro_f1", split="dev", selection="last")]
    root = make_workdir(tmp_path / "a", make_rows() + other)
    report.main(["--workdir", str(root), "--metric", "macro_f1", "--split", "dev", "--selection", "last"])
    text = (root / "report" / "results.md").read_text()
    assert "macro_f1 in % on the dev split" in text and "last checkpoint (last)" in text
    assert "| vanilla | 25.0 ± 0.0 |" in text


def test_asked_for_languages_come_from_the_config(tmp_path):
    root = make_workdir(tmp_path / "a", make_rows(), target_languages=("de", "fr"))
    with pytest.raises(UserError, match="vanilla seed 0 has no test accuracy in fr"):
        report.main(["--workdir", str(root)])


def test_a_workdir_without_results_says_what_to_run(tmp_path):
    root = make_workdir(tmp_path / "a", [])
    with pytest.raises(UserError, match="no results"):
        report.main(["--workdir", str(root)])
    (root / "results.jsonl").unlink()
    with pytest.raises(UserError, match="run python -m xtransfer.evaluate first"):
        report.main(["--workdir", str(root)])


def test_number_of_classes_is_found(tmp_path):
    config = ExperimentConfig()
    workdir = report.Workdir(tmp_path)
    assert report.find_num_classes(workdir, config) is None
    (tmp_path / "logits" / "abc").mkdir(parents=True)
    manifest = tmp_path / "logits" / "abc" / "manifest.json"
    manifest.write_text('{"classes": ["a", "b", "c"]}')
    assert report.find_num_classes(workdir, config) == 3
    labelled = dataclasses.replace(config, task=TaskConfig(labels=("a", "b")))
    assert report.find_num_classes(workdir, labelled) == 2
    manifest.write_text("{")
    with pytest.raises(UserError, match="manifest.json"):
        report.find_num_classes(workdir, config)


def test_an_unwritable_report_directory_is_named(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the report to .*report"):
        report.write(table(), tmp_path / "report")
