"""Several source languages, from end to end on tiny files."""

import json

import pytest

from tests.helpers import tiny
from xtransfer import main
from xtransfer.config import TaskConfig, load
from xtransfer.data import user_files
from xtransfer.data.registry import load_task
from xtransfer.describe import __main__ as describe
from xtransfer.distillation import transfer_set
from xtransfer.errors import ConfigError, DataError, UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.evaluation.results import read_rows
from xtransfer.experiment import check
from xtransfer.export.model_card import model_card
from xtransfer.report import __main__ as report
from xtransfer.runs import sharing
from xtransfer.runs.find import find_run, read_dev_scores
from xtransfer.runs.workdir import Workdir, as_record, check_config_unchanged, read_task
from xtransfer.train import metrics_log

BOTH = "--config.task.source_languages=('en','de')"
FAST = ("--config.student.steps=8", "--config.student.evaluations=2", "--config.task.labelled=24")
FAST += ("--config.teacher.steps=12", "--config.teacher.evaluations=2", "--config.objectives=('vanilla','monox_kd')")
BY_MEAN = "best on the dev splits of the source languages, by the mean over them"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config, and files of three languages with 64, 32, and 64 training texts."""
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data", languages=("en", "de", "fr"))
    train = data / "de" / "train.tsv"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:33]))
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    return tiny.config_file(root / "tiny.py", data, teacher, student)


def start(config_file, workdir, *flags):
    main.main(["--config", str(config_file), "--workdir", str(workdir), *FAST, *flags])


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sources") / "run"
    start(config_file, workdir, BOTH, "--config.oracle=True", "--config.calibration.temperature=True")
    return workdir


def test_the_transfer_set_has_both_languages_in_their_proportions(finished):
    (store,) = (finished / "logits").iterdir()
    ids = [id_.split("/")[1:3] for id_ in (store / "ids.txt").read_text().splitlines()]
    # Of 24 labels 16 : 8, and then the rest of train: 48 and 24.
    assert ids == [["train", "en"]] * 16 + [["train", "de"]] * 8 + [["train", "en"]] * 48 + [["train", "de"]] * 24


def test_each_row_has_its_own_language_and_the_teacher_knows_its_own(finished):
    scored, agreeing = {}, set()
    for row in tiny.rows_of(finished):
        scored.setdefault(row["objective"], set()).add(row["language"])
        if row["metric"] == "teacher_agreement":
            agreeing.add(row["language"])
    students = dict.fromkeys(("vanilla", "monox_kd"), {"en", "de", "fr"})
    assert scored == {"teacher": {"en", "de"}} | students and agreeing == {"en", "de"}


@pytest.mark.parametrize("run", ["teacher", "students/vanilla/seed-0"])
def test_the_mean_over_source_languages_selects_the_checkpoint(finished, run, capsys):
    rows = tiny.rows_of(finished / run, metrics_log.METRICS_FILE)
    assert len(rows) == 2
    for row in rows:
        by_language = row["source_dev_metrics"]
        assert by_language.keys() == {"en", "de"}
        assert row["dev_accuracy"] == (by_language["en"]["dev_accuracy"] + by_language["de"]["dev_accuracy"]) / 2
        if run != "teacher":  # an oracle selects on each language's own dev split
            assert row["target_dev_scores"].keys() == {"en", "de", "fr"}
            assert row["target_dev_scores"]["de"] == by_language["de"]["dev_accuracy"]
    metrics_log.read_metrics(finished / run)
    assert "damaged" not in capsys.readouterr().out
    best = max(rows, key=lambda row: (row["dev_accuracy"], -row["step"]))
    selected = {
        row["step"]
        for row in tiny.rows_of(finished)
        if row["objective"] == run.removeprefix("students/").split("/")[0] and row["selection"] == "source_dev"
    }
    assert selected == {best["step"]}
    assert read_dev_scores(finished / run).source == {row["step"]: row["dev_accuracy"] for row in rows}


def test_dev_of_each_language_is_what_an_evaluation_finds(finished, capsys):
    evaluate.main(["--workdir", str(finished), "--split", "dev"])
    capsys.readouterr()
    recorded = {
        row["step"]: row for row in tiny.rows_of(finished / "students" / "vanilla" / "seed-0", metrics_log.METRICS_FILE)
    }
    chosen = [
        row
        for row in tiny.rows_of(finished)
        if (row["objective"], row["split"], row["metric"], row["selection"])
        == ("vanilla", "dev", "accuracy", "source_dev")
    ]
    in_sources = [row for row in chosen if row["language"] in ("en", "de")]
    assert len(in_sources) == 2
    for row in in_sources:
        assert row["value"] == recorded[row["step"]]["source_dev_metrics"][row["language"]]["dev_accuracy"]


def test_means_by_hand():
    metrics = {"en": {"dev_accuracy": 0.9, "dev_score": -1.0}, "de": {"dev_accuracy": 0.2, "dev_score": -2.0}}
    assert metrics_log.mean_over_languages(metrics) == {
        "dev_accuracy": pytest.approx(0.55),
        "dev_score": -1.5,
        "source_dev_metrics": metrics,
    }
    assert metrics_log.mean_over_languages({"en": {"dev_accuracy": 0.9}}) == {"dev_accuracy": 0.9}
    assert metrics_log.mean_over_languages({}) == {}


def test_reports_leave_both_languages_out_of_the_average(finished, capsys):
    report.main(["--workdir", str(finished)])
    table = (finished / "report" / "results.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("| objective"))
    assert [cell.strip() for cell in header.split("|")[2:6]] == ["en (source)", "de (source)", "fr", "avg of targets"]
    for line in table.splitlines():
        if line.startswith("| vanilla"):
            cells = [cell.strip() for cell in line.split("|")]
            assert cells[4] == cells[5]
    assert "without the source languages en and de." in table and BY_MEAN in table
    page = (finished / "report" / "report.html").read_text()
    assert "en, de → fr" in page and BY_MEAN in page and "mean accuracy on en, de dev" in page
    assert "failed" not in page
    marks = [page.count(f">{language}</span> <small>source</small>") for language in ("en", "de", "fr")]
    assert marks[0] == marks[1] > 0 == marks[2]
    report.main(["--workdir", str(finished), "--protocols"])
    assert "avg of en, de (sources)" in (finished / "report" / "protocols.md").read_text()
    report.main(["--workdir", str(finished), "--compare", "monox_kd", "vanilla"])
    languages = [row["language"] for row in tiny.rows_of(finished / "report", "compare-monox_kd-vanilla.jsonl")]
    assert languages == ["en", "de", "fr", None]
    report.main(["--workdir", str(finished), "--metric", "teacher_agreement"])
    agreement = (finished / "report" / "teacher_agreement.md").read_text()
    assert "teacher_agreement, en (source)" in agreement and "accuracy, de (source)" in agreement
    assert "warning" not in capsys.readouterr().out


def test_the_model_card_names_both(finished):
    rows = read_rows(finished / "results.jsonl")
    card = model_card(find_run(Workdir(finished), "monox_kd", 0, "source_dev"), rows)
    assert "trained on en and de alone and is meant for fr as well" in card
    assert "24 labelled texts in proportion to their sizes, balanced over classes in each language, from the en" in card
    assert "de (source)" in card and "mean of targets" not in card
    teacher = model_card(find_run(Workdir(finished), "teacher", None, "source_dev"), rows)
    assert "It is for en and de only." in teacher and "fine-tuned on en and de labels" in teacher


def test_records_name_the_languages_and_another_start_does_nothing(config_file, finished, capsys):
    assert read_task(Workdir(finished)).source_languages == ("en", "de")
    before = (finished / "results.jsonl").read_bytes()
    start(config_file, finished, BOTH, "--config.oracle=True", "--config.calibration.temperature=True")
    out = capsys.readouterr().out
    assert "· loss" not in out and "damaged" not in out and (finished / "results.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"source_shares: \[\] → \[3.0, 1.0\]"):
        start(config_file, finished, BOTH, "--config.task.source_shares=(3,1)", "--config.oracle=True")


def test_description_shows_sizes_before_and_after_sampling(config_file, capsys, tmp_path):
    shares = "--config.task.source_shares=(1,1)"
    describe.main(["--config", str(config_file), *FAST, BOTH, shares, "--json", str(tmp_path / "d.json")])
    text = capsys.readouterr().out
    # 24 labels leave 52 and 20 texts, of which equal shares take 20 and 20.
    assert "| en | 64 | 12 (50.0%) | 52 | 20 (50.0%) |" in text
    assert "| de | 32 | 12 (50.0%) | 20 | 20 (50.0%) |" in text
    assert "in the proportions 1 : 1" in text
    assert json.loads((tmp_path / "d.json").read_text())["other_sources"] == ["de"]
    describe.main(["--config", str(config_file), *FAST, "--json", str(tmp_path / "one.json")])
    assert "Source languages" not in capsys.readouterr().out
    assert not {"other_sources", "proportions"} & json.loads((tmp_path / "one.json").read_text()).keys()


def test_one_language_in_the_list_is_the_old_setting(config_file, tmp_path):
    alone = load(str(config_file), ["--config.task.source_language=de"])
    assert load(str(config_file), ["--config.task.source_languages=('de',)"]) == alone
    # A record of an older version, which has none of the keys.
    workdir = Workdir(tmp_path)
    record = as_record(alone)
    for key in ("source_languages", "source_shares", "sampling_temperature"):
        del record["task"][key]
    workdir.config.write_text(json.dumps(record))
    check_config_unchanged(workdir, alone)
    changed = load(str(config_file), ["--config.task.source_languages=('de','en')"])
    with pytest.raises(UserError, match="source_languages"):
        check_config_unchanged(workdir, changed)


def test_a_teacher_of_one_language_is_selected_in_it(config_file):
    config = load(str(config_file), [*FAST, BOTH])
    with pytest.raises(ConfigError, match="no teacher reads task.source_languages 'de': add it to one"):
        load(str(config_file), [BOTH, "--config.teacher.languages=('en',)"])
    task = load_task(config.task, config.further_sources)
    sample = transfer_set.gather(config, task)
    assert {name: len(split) for name, split in sample.dev_in(("de",)).items()} == {"de": 16}
    assert list(sample.dev_in(("en", "de"))) == ["en", "de"]


def test_a_run_depends_on_the_proportions(config_file):
    settings = [
        sharing.settings_of(load(str(config_file), [*FAST, BOTH, *flags]), "vanilla")
        for flags in ((), ("--config.task.source_shares=(3,1)",), ("--config.task.sampling_temperature=2.0",))
    ]
    assert settings[0] != settings[1] != settings[2] != settings[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["source_languages=('en','xx')"], "task.source_languages: no data in 'xx'; there are de, en, fr"),
        (["source_languages=('en','de','en')"], "name each language once"),
        (
            ["source_languages=('en','de')", "source_language=fr"],
            "source_language is 'fr': name the main source language first",
        ),
        (
            ["source_languages=('en','de')", "target_languages=('de','fr')"],
            "task.target_languages has 'de' too: a language with training text is no zero-shot target",
        ),
        (["source_languages=('en','de')", "source_shares=(1,1,1)"], "give 2 shares, one for each of"),
        (["source_languages=('en','de')", "source_shares=(1,0)"], "each share must be above 0"),
        (["source_languages=('en','de')", "source_shares=(1.0,1e999)"], "it must be a finite number"),
        (["source_languages=('en','de')", "source_shares=(1e308,1e308)"], "their sum is too large for a float"),
        (
            ["source_languages=('en','de')", "source_shares=(1,1)", "sampling_temperature=2.0"],
            "leave one of them out",
        ),
        (["source_shares=(1,)"], "source_shares is .*, but there is only one source language"),
        (["sampling_temperature=2.0"], "sampling_temperature is 2.0, but there is only one source language"),
        (["source_languages=('en','de')", "sampling_temperature=0.5"], "must be between 1 and infinity"),
        (
            ["source_languages=('en','de')", "labelled=99"],
            "99: the share of en is 66 examples, .*: 64; 0 takes 96 in all",
        ),
        (["source_languages=('en','de')", "labelled=1"], "task.labelled 1 leaves no example in de"),
        (
            ["source_languages=('en','de')", "labelled=3"],
            "task.labelled 3 leaves no example of '(bad|good)' to train on in de: raise it, or the share in de",
        ),
        (
            ["source_languages=('en','de')", "source_shares=(4,1)", "labelled=0"],
            "no such text in en: lower task.labelled, which takes all of its train, or leave en out",
        ),
        (["source_languages=('en','de','fr')"], "there is no language but en and de and fr"),
    ],
)
def test_settings_that_cannot_work_are_one_line_before_training(config_file, flags, message):
    with pytest.raises(UserError, match=message) as error:
        check(load(str(config_file), [*FAST, *(f"--config.task.{flag}" for flag in flags)]))
    assert "\n" not in str(error.value)


def test_a_language_without_labels_or_dev_is_named(tmp_path):
    data = tiny.write_task(tmp_path / "data", languages=("en", "de", "fr"))
    encoder = tiny.checkpoint(tmp_path / "encoder")
    path = tiny.config_file(tmp_path / "tiny.py", data, encoder, encoder)
    logits = "--config.teacher.logits_file=nowhere.jsonl"  # such a teacher needs no labels
    (data / "de" / "train.tsv").unlink()
    with pytest.raises(UserError, match="de/train.tsv: no such file"):
        check(load(str(path), [*FAST, BOTH]))
    config = load(str(path), [*FAST, BOTH, logits, "--config.task.labels=('bad','good')"])
    with pytest.raises(DataError, match=r"no labelled text in de \(no train split\), .*: add it, or leave de out"):
        transfer_set.gather(config, load_task(config.task, config.further_sources))


@pytest.mark.parametrize("source", ["en", "de"])
def test_text_files_with_all_languages_go_with_files_of_one_language_each(config_file, tmp_path, source):
    path = tmp_path / "more.tsv"
    path.write_text("text\tlang\n" + "".join(f"film {i}\t{('en', 'de', 'fr')[i % 3]}\n" for i in range(9)))
    flags = [*FAST, f"--config.task.source_languages=('{source}','{'de' if source == 'en' else 'en'}')"]
    flags += ["--config.task.language_column=lang"]
    unlabelled = [*flags, "--config.task.unlabelled_from=file", f"--config.task.unlabelled_file={path}"]
    config = load(str(config_file), unlabelled)
    sample = transfer_set.gather(config, load_task(config.task, config.further_sources))
    assert sorted(example.text for example in sample.unlabelled) == [f"film {i}" for i in (0, 1, 3, 4, 6, 7)]
    target = [*flags, "--config.task.target_text_from=file", f"--config.task.target_text_file={path}"]
    config = load(str(config_file), target)
    task = load_task(config.task, config.further_sources)
    assert [example.text for example in task.load("unlabelled", "fr")] == ["film 2", "film 5", "film 8"]
    assert len(task.load("train", "en")) == 64
    with pytest.raises(ConfigError, match="because the languages are in task.language_column 'lang'"):
        check(load(str(config_file), flags))


def test_an_unlabelled_file_says_the_language_of_each_row(config_file, tmp_path):
    path = tmp_path / "more.tsv"
    path.write_text("text\tlang\n" + "".join(f"film {i}\t{'en' if i < 6 else 'de'}\n" for i in range(8)))
    flags = [*FAST, BOTH, "--config.task.unlabelled_from=file", f"--config.task.unlabelled_file={path}"]
    with pytest.raises(ConfigError, match="there are 2 source languages, so name the file's column"):
        load(str(config_file), flags)
    with pytest.raises(DataError, match=r"more.tsv: no column 'tongue' \(task.language_column\)"):
        user_files.check_language_column(TaskConfig(unlabelled_file=str(path), language_column="tongue"))
    user_files.check_language_column(TaskConfig(unlabelled_file=str(path), language_column="lang"))
