"""Students that learn from unlabelled text in target languages, from end to end on tiny files."""

import dataclasses
import json
import re

import jax
import pytest

from tests.helpers import tiny
from xtransfer import main
from xtransfer.config import TaskConfig, differences, load
from xtransfer.data.registry import load_task
from xtransfer.data.sampling import target_examples
from xtransfer.describe import __main__ as describe_command
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import definitions, describe, uses_target_text
from xtransfer.distillation.teachers import refuse_without_dev
from xtransfer.errors import ConfigError, UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.evaluation.results import Summary, aggregate, read_rows
from xtransfer.experiment import check
from xtransfer.export.model_card import model_card
from xtransfer.precompile.steps import Override, steps
from xtransfer.report import __main__ as report
from xtransfer.report import summary, sweep_report
from xtransfer.report.page.sources import Source
from xtransfer.runs import sharing
from xtransfer.runs.find import find_run
from xtransfer.runs.workdir import Workdir, as_record, read_config, read_task
from xtransfer.runtime.sharding import make_mesh
from xtransfer.study import comparison as study_comparison
from xtransfer.study import runner as study_runner
from xtransfer.train.inputs import ModelInputs

EVERY = "--config.objectives=('vanilla','monox_kd','hop','again','after')"
FAST = ("--config.student.steps=4", "--config.student.evaluations=2", "--config.task.labelled=24")
FAST += ("--config.teacher.steps=6", "--config.teacher.evaluations=1", "--config.task.target_text=10")
MARK = "(uses target text)"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config with a hop to a German encoder, self-training on all target text, and one after that."""
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data", languages=("en", "de", "fr"))
    for language in ("de", "fr"):  # no labels in them
        lines = (data / language / "train.tsv").read_text().splitlines()
        texts = [line.split("\t")[0] for line in lines]
        (data / language / "unlabelled.tsv").write_text("\n".join([*texts[:20], ""]))
        (data / language / "train.tsv").unlink()
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    german = tiny.checkpoint(root / "german", seed=3, hidden=12)
    path = tiny.config_file(root / "tiny.py", data, teacher, student)
    hop = {"base": "self_training", "teacher": "monox_kd", "data": "target"}
    lines = [
        f"    config.students.german = {dict(checkpoint=str(german), steps=3)!r}",
        f"    config.objective.hop = {dict(hop, student='german', languages=('de',))!r}",
        f"    config.objective.again = {dict(hop)!r}",
        "    config.objective.after = {'base': 'self_training', 'teacher': 'again'}",
        "    config.objectives = ('monox_kd', 'hop', 'again')",
    ]
    path.write_text(path.read_text().replace("    return config", "\n".join([*lines, "    return config"])))
    return path


def start(config_file, workdir, *flags):
    main.main(["--config", str(config_file), "--workdir", str(workdir), *FAST, *flags])


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("hop") / "run"
    start(config_file, workdir)
    return workdir


def test_the_student_labels_the_sampled_target_text_and_the_teacher_the_source_text(finished):
    ids = [(path / "ids.txt").read_text().splitlines() for path in (finished / "logits").iterdir()]
    languages = sorted((sorted({id_.split("/")[2] for id_ in store}), len(store)) for store in ids)
    assert languages == [(["de"], 10), (["de", "fr"], 20), (["en"], 64)]


def test_each_student_is_scored_in_the_languages_that_it_knows(finished):
    scored = {}
    for row in tiny.rows_of(finished):
        scored.setdefault(row["objective"], set()).add(row["language"])
    everything = {"en", "de", "fr"}
    assert scored == {"teacher": {"en"}, "hop": {"de"}} | dict.fromkeys(("monox_kd", "again"), everything)
    # Without the source language, no dev split selects a checkpoint, and the last is used.
    assert {row["step"] for row in tiny.rows_of(finished) if row["objective"] == "hop"} == {3}
    metrics = finished / "students" / "hop" / "seed-0" / "metrics.jsonl"
    assert "dev_accuracy" not in metrics.read_text()


def test_the_second_encoder_is_recorded_and_found(finished):
    task = read_task(Workdir(finished))
    assert task.students.keys() == {"students.german"}
    run = find_run(Workdir(finished), "hop", 0, "source_dev")
    assert run.fingerprint == task.students["students.german"] != task.student_checkpoint
    assert run.settings.checkpoint.endswith("german") and run.languages == ("de",) and run.step == 3


def test_every_number_of_target_text_is_marked(finished, capsys):
    report.main(["--workdir", str(finished)])
    table = (finished / "report" / "results.md").read_text()
    page = (finished / "report" / "report.html").read_text()
    for name in ("hop", "again"):
        assert f"{name} {MARK}" in table and re.search(rf">{name}(</\w+>)?<small> \(uses target text\)", page)
    assert f"monox_kd {MARK}" not in table and not re.search(r">monox_kd(</\w+>)?<small> \(uses", page)
    cells = next(line for line in table.splitlines() if line.startswith(f"| hop {MARK}")).split("|")
    accuracy = next(
        row["value"] for row in tiny.rows_of(finished) if (row["objective"], row["metric"]) == ("hop", "accuracy")
    )
    assert [cell.strip() for cell in cells[2:6]] == ["–", f"{accuracy * 100:.1f}", "–", "–"]
    assert "uses target text: again, hop learned from unlabelled text" in table
    capsys.readouterr()
    report.main(["--workdir", str(finished), "--compare", "hop", "monox_kd"])
    compared = (finished / "report" / "compare-hop-monox_kd.md").read_text()
    assert f"hop {MARK}" in compared and "| de |" in compared and "(source)" not in compared
    report.main(["--workdir", str(finished), "--protocols"])
    assert f"again {MARK}" in (finished / "report" / "protocols.md").read_text()


def test_rows_of_target_text_are_marked_for_programs(finished):
    marks = {name: set() for name in ("teacher", "monox_kd", "hop", "again")}
    for row in tiny.rows_of(finished):
        marks[row["objective"]].add(row.get("uses_target_text"))
    assert marks == {"teacher": {None}, "monox_kd": {None}, "hop": {True}, "again": {True}}


def test_an_average_of_some_target_languages_says_so(finished):
    report.main(["--workdir", str(finished), "--compare", "hop", "again"])
    compared = (finished / "report" / "compare-hop-again.md").read_text()
    assert "avg of targets: mean over de alone, the target languages that both know." in compared
    assert "hop: no dev split selects its checkpoint" in compared and "again: no dev split" not in compared
    report.main(["--workdir", str(finished), "--compare", "again", "monox_kd"])
    assert "avg of targets: mean over" not in (finished / "report" / "compare-again-monox_kd.md").read_text()


def test_an_encoder_that_knows_every_target_has_an_average_and_no_transfer_gap(finished):
    workdir = Workdir(finished)
    config, task, rows = read_config(workdir), read_task(workdir), read_rows(workdir.results)
    results = aggregate(rows, source_languages=("en",), target_languages=("de",), objectives=definitions(config))
    hop = next(line for line in results.lines if line.objective == "hop")
    assert hop.average is not None and not any("without an average" in line for line in summary.caption(results, task))
    source = Source(workdir, config, task, tuple(rows), results)
    assert source.students == ("monox_kd", "again")  # hop has nothing in the source language to compare with
    assert source.comparisons.keys() == {"monox_kd", "again"}


def test_a_study_marks_target_text_and_leaves_out_what_some_languages_lack(config_file, finished):
    results = study_runner._results(load(str(config_file), list(FAST)), Workdir(finished))
    compared = study_comparison.compare("main", [results])
    assert compared.targets.keys() == {"monox_kd", "again"}
    compared = dataclasses.replace(compared, gains={name: Summary({0: 0.1}) for name in ("monox_kd", "again")})
    assert study_comparison.table([compared]).header[-2:] == ("monox_kd", f"again {MARK}")


def test_a_sweep_over_what_an_objective_reads_marks_its_column(finished):
    workdir = Workdir(finished)
    known = definitions(read_config(workdir))
    results = aggregate(read_rows(workdir.results), source_languages=("en",), objectives=known)
    unmarked = dataclasses.replace(results, objectives={**known, "again": known["monox_kd"]})
    tables = {"a": unmarked, "b": results}
    points = [sweep_report.PointResults(name, {"k": name}, table, False) for name, table in tables.items()]
    assert sweep_report.table_of(("k",), points).header == ("k", "teacher, source", "monox_kd", f"again {MARK}")
    both = dataclasses.replace(results, source_languages=("en", "fr"))  # of which the teacher reads one
    notes = sweep_report.table_of(("k",), [sweep_report.PointResults("c", {"k": "c"}, both, False)]).notes
    assert any("the teacher in en. " in note for note in notes)


def test_a_hop_may_be_added_to_a_finished_experiment(config_file):
    added = as_record(load(str(config_file), list(FAST)))
    plain = json.loads(json.dumps(added))
    plain["students"], plain["objective"] = {}, {}
    assert differences(plain, added) == []
    facts = {"name": "files", "students": {"students.german": "digest"}}
    assert differences({"name": "files"}, facts) == []
    changed = {"name": "files", "students": {"students.german": "another"}}
    assert differences(changed, facts) == ["students.students.german: 'another' → 'digest'"]
    changed = json.loads(json.dumps(added))
    changed["students"]["german"]["steps"] = 9
    assert differences(changed, added) == ["students.german.steps: 9 → 3"]


def test_the_model_card_says_so(finished):
    card = model_card(find_run(Workdir(finished), "hop", 0, "source_dev"), tiny.rows_of(finished))
    assert "**Uses target text.**" in card and "uses-target-text" in card and "zero-shot-transfer" not in card
    assert "10 unlabelled texts in de from the unlabelled split" in card and "meant for de." in card
    assert "the `monox_kd` student" in card and "(de, uses target text)" in card
    zero_shot = model_card(find_run(Workdir(finished), "monox_kd", 0, "source_dev"), tiny.rows_of(finished))
    assert "target text" not in zero_shot.lower() and "zero-shot-transfer" in zero_shot


def test_it_resumes_and_is_scored_again(config_file, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.npy")}
    start(config_file, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.npy")} == before
    rows = (finished / "results.jsonl").read_bytes()
    (finished / "results.jsonl").unlink()
    evaluate.main(["--workdir", str(finished)])
    assert sorted((finished / "results.jsonl").read_bytes().splitlines()) == sorted(rows.splitlines())


def test_only_what_reads_target_text_depends_on_it(config_file):
    configs = [load(str(config_file), [*FAST, EVERY, f"--config.task.target_text={n}"]) for n in (10, 12)]
    same = {name: len({str(sharing.settings_of(one, name)) for one in configs}) == 1 for name in configs[0].objectives}
    assert same == {"vanilla": True, "monox_kd": True, "hop": False, "again": False, "after": False}
    configs = [load(str(config_file), [*FAST, EVERY, f"--config.students.german.steps={n}"]) for n in (3, 5)]
    same = {name: len({str(sharing.settings_of(one, name)) for one in configs}) == 1 for name in configs[0].objectives}
    assert same == {"vanilla": True, "monox_kd": True, "hop": False, "again": True, "after": True}
    assert sharing.roles_of(configs[0], "hop") == ("teacher", "student", "students.german")
    assert sharing.roles_of(configs[0], "vanilla") == ("student",)


def test_target_text_is_read_without_labels_and_only_if_an_objective_wants_it(config_file, tmp_path):
    config = load(str(config_file), list(FAST))
    sample = transfer_set.gather(config, load_task(config.task))
    assert {language: len(examples) for language, examples in sample.target.items()} == {"de": 10, "fr": 10}
    assert all(example.label == -1 for examples in sample.target.values() for example in examples)
    config = load(str(config_file), [*FAST, "--config.objectives=('vanilla','monox_kd')"])
    assert not transfer_set.gather(config, load_task(config.task)).target
    path = tmp_path / "texts.tsv"
    path.write_text("text\tlang\nder Film ist gut\tde\nle film est bon\tfr\nle film est beau\tfr\n")
    flags = [*FAST, "--config.task.target_text_from=file", f"--config.task.target_text_file={path}"]
    flags += ["--config.task.target_text=1", "--config.objectives=('vanilla','monox_kd','hop')"]
    with pytest.raises(UserError, match="target_text_file: there are 2 target languages, so name the file's column"):
        check(load(str(config_file), flags))
    flags += ["--config.task.target_languages=('de',)", "--config.task.target_text=2"]
    config = load(str(config_file), flags)
    texts = [example.text for example in transfer_set.gather(config, load_task(config.task)).target["de"]]
    assert len(texts) == 2 and set(texts) < {"der Film ist gut", "le film est bon", "le film est beau"}


def test_an_empty_sample_is_not_called_too_small():
    with pytest.raises(ConfigError, match="there is no such text in fr: add some, or leave fr out"):
        target_examples([], 0, 0, "fr")


def test_samples_of_target_text_differ_by_their_seed():
    assert TaskConfig(target_text=5).has_samples and not TaskConfig().has_samples


def test_patience_of_any_encoder_needs_a_dev_split(config_file):
    flags = ["--config.objective.hop.languages=()", "--config.students.german.patience=1"]
    with pytest.raises(ConfigError, match="students.german.patience needs a dev split in en, and there is none"):
        refuse_without_dev(load(str(config_file), [*FAST, *flags]), "en")


def test_precompile_takes_the_encoder_and_the_text_of_the_objective(config_file, tmp_path, monkeypatch):
    flags = ["--config.objectives=('vanilla','hop')", "--config.objective.hop.teacher=vanilla"]
    config = load(str(config_file), [*FAST, *flags, f"--config.task.cache_dir={tmp_path}"])
    read, dataset = [], ModelInputs.dataset

    def recorded(self, examples, *rest):
        read.extend(examples)
        return dataset(self, examples, *rest)

    monkeypatch.setattr(ModelInputs, "dataset", recorded)
    (step,) = steps(config, make_mesh(), Override(), ["student_train"])
    assert {example.language for example in read} == {"de"} and len(read) == 10
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(step.arguments[0].params) if leaf.shape[0] > 24} == {12}


def test_the_description_has_the_target_text(config_file, capsys):
    describe_command.main(["--config", str(config_file), *FAST])
    page = capsys.readouterr().out
    rows = ["| none | de | T | 10 |", "| none | fr | T | 10 |", "| students.german | de | T | 10 |"]
    rows += ["| student | fr | T | 10 |", "| students.german | T of hop |", "| student | T of again |"]
    assert all(row in page for row in rows)


def test_a_target_language_without_unlabelled_text_is_named_with_the_key_to_change(config_file, tmp_path):
    data = tiny.write_task(tmp_path / "data", languages=("en", "de", "fr"))
    flags = [*FAST, f"--config.task.data_dir={data}"]
    with pytest.raises(UserError, match=r"target_text_from is 'split', but there is no unlabelled split in de: add it"):
        check(load(str(config_file), flags))
    check(load(str(config_file), [*flags, "--config.task.target_text_from=train"]))


def test_an_objective_that_is_not_trained_needs_no_dev(config_file):
    flags = [*FAST, "--config.calibration.temperature=True", "--config.objectives=('vanilla','monox_kd')"]
    assert load(str(config_file), flags).calibration.temperature


def test_a_finished_experiment_takes_another_encoder(config_file, tmp_path):
    text = config_file.read_text()
    fewer = tmp_path / "fewer.py"
    left_out = ("config.students.german", "config.objective.hop ", "config.objectives")
    lines = [line for line in text.splitlines() if not line.strip().startswith(left_out)]
    fewer.write_text("\n".join([*lines, ""]))
    workdir, flags = tmp_path / "run", ["--config.task.target_text=10"]
    start(fewer, workdir, *flags, "--config.objectives=('vanilla','monox_kd')")
    runs = [workdir / "teacher", workdir / "students" / "monox_kd", workdir / "students" / "vanilla"]
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("metrics.jsonl")}
    start(config_file, workdir, "--config.objectives=('vanilla','monox_kd','hop')")
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 3
    assert read_task(Workdir(workdir)).students.keys() == {"students.german"}
    assert find_run(Workdir(workdir), "hop", 0, "source_dev").step == 3
    with pytest.raises(UserError, match=r"\((objective[^;]*; )+students\.german: left out\)"):
        start(fewer, workdir, *flags, "--config.objectives=('vanilla','monox_kd')")


@pytest.mark.parametrize(("objective", "language"), [("hop", "de"), ("again", "de and fr")])
def test_a_student_of_target_text_is_no_ready_made_teacher_for_that_language(
    config_file, finished, objective, language
):
    flags = [*FAST, "--config.teacher.steps=0", "--config.teacher.evaluations=1", "--config.objectives=('monox_kd',)"]
    flags.append("--config.teacher.checkpoint={}")
    with pytest.raises(UserError, match=rf"teacher\.checkpoint is .*, which learned from text in {language}: a target"):
        check(load(str(config_file), [flag.format(finished / f"students/{objective}/seed-0") for flag in flags]))
    check(load(str(config_file), [flag.format(finished / "students/monox_kd/seed-0") for flag in flags]))
    targets = "--config.task.target_languages=('fr',)"
    flags = [flag.format(finished / "students/hop/seed-0") for flag in [*flags, targets]]
    path = config_file.with_name("plain.py")
    path.write_text(config_file.read_text().replace("'languages': ('de',)", "'languages': ('fr',)"))
    check(load(str(path), flags))  # that one read no French


def test_test_texts_that_are_in_target_text_are_counted(config_file, tmp_path, capsys):
    data = tiny.write_task(tmp_path / "data", languages=("en", "de", "fr"))
    for language in ("de", "fr"):
        (data / language / "train.tsv").rename(data / language / "unlabelled.tsv")
    texts = [line.split("\t")[0] for line in (data / "de" / "test.tsv").read_text().splitlines()]
    (data / "de" / "unlabelled.tsv").write_text("\n".join([*texts[:13], ""]))
    (data / "fr" / "unlabelled.tsv").write_text("text\n" + "".join(f"un film {i}\n" for i in range(12)))
    flags = [*FAST, "--config.task.target_text=0", f"--config.task.data_dir={data}"]
    describe_command.main(["--config", str(config_file), *flags])
    shared = sum(text in texts[1:13] for text in texts[1:])
    line = f"also in target text (T): {shared} of {len(texts) - 1} in test de, 0 of {len(texts) - 1} in test fr\n"
    assert line in capsys.readouterr().out and shared >= 12


def test_the_definitions_say_what_they_read(config_file):
    known = definitions(load(str(config_file), list(FAST)))
    assert {name for name in known if uses_target_text(known, name)} == {"hop", "again", "after"}
    hop = "KL(the monox_kd student's logits; T = 1) on unlabelled text in de, by students.german"
    assert describe(known["hop"]) == hop
    assert describe(known["again"]).endswith("on unlabelled text in all target languages")
    assert known["hop"].loss_settings() == known["monox_kd"].loss_settings()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.objective.hop.teacher=nobody"], r"objective\.hop\.teacher is 'nobody': choose from none, monol"),
        (["--config.objective.hop.teacher=monolingual"], r"monolingual teacher cannot read target languages"),
        (["--config.objective.hop.languages=('xx',)"], r"objective\.hop\.languages has 'xx', which is none of the tar"),
        (["--config.objective.hop.student=greek"], r"student is 'greek': students has no such entry .*german"),
        (["--config.objective.after.teacher=hop"], r"teacher is 'hop', which knows de alone"),
        (["--config.objective.hop.data=all"], r"languages = \('de',\), expected \(\) unless data is 'target'"),
        (["--config.objective.again.hard_weight=1"], r"hard_weight = 1\.0, expected 0 with data 'target'"),
        (["--config.objectives=('hop','monox_kd')"], r"hop learns from the student of 'monox_kd'; list that"),
        (["--config.objective.vanilla.student=german"], r"objective\.vanilla\.student: what vanilla reads is fixed"),
        (["--config.objective.hop.student="], r"students\.german: no objective trains it"),
        (["--config.calibration.temperature=True"], r"calibration\.temperature uses the source language's dev split"),
        (["--config.students.german.patience=1"], r"students\.german\.patience uses the source language's dev split"),
        (["--config.task.target_text=99"], r"task\.target_text 99 is more than available in de: 19"),
        (
            ["--config.task.target_text_from=train"],
            r"task\.target_text_from is 'train', .*no train split in de: add it",
        ),
        (["--config.objective.hop.teacher=hop"], r"teacher is 'hop', which cannot be its own teacher"),
        (["--config.objective.monolingual.base=vanilla"], r"objective\.monolingual: 'monolingual' is a value of"),
        (["--config.task.target_text_file=x.tsv"], r"name a file if, and only if, that is 'file'"),
        (["--config.students.greek.steps=1"], r"no such student \(its students: german\)"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(config_file, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        check(load(str(config_file), [*FAST, *flags]))
    assert "\n" not in str(caught.value)
