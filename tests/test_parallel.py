"""Students that learn from translations, with the teacher's logits for the originals, on tiny files."""

import json
import math

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import experiment, main
from xtransfer.config import load
from xtransfer.data.registry import load_task
from xtransfer.data.task import Example, Pairs
from xtransfer.describe import __main__ as describe_command
from xtransfer.describe.dataset import transfer_rows
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import OBJECTIVES, Objective, definitions, describe, kinds_of_target_text
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import UserError
from xtransfer.evaluation.results import ResultsTable
from xtransfer.experiment import check
from xtransfer.export.model_card import model_card
from xtransfer.report import __main__ as report
from xtransfer.runs import sharing
from xtransfer.runs.find import find_run
from xtransfer.runs.workdir import Workdir
from xtransfer.train.finetuning import Finetuner

FAST = ("--config.student.steps=2", "--config.student.evaluations=1", "--config.task.labelled=24")
FAST += ("--config.teacher.steps=3", "--config.teacher.evaluations=1", "--config.task.parallel=8")
MARK = "(uses target text)"


def write_pairs(path, number=10, languages=("de", "fr")):
    """Write pairs of words with the same place in `tiny`'s tables, in turn for each language."""
    rows = [
        {
            "text": f"the film is {words['en'][number % 3]}",
            "translation": f"{tiny.FILLER[language][1]} {words[language][number % 3]}",
            "language": language,
        }
        for number in range(number)
        for language in languages
        for words in [(tiny.GOOD, tiny.BAD)[number % 2]]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config whose objectives on translations have the monolingual teacher, a German encoder, or a student."""
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data", languages=("en", "de", "fr"))
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    german = tiny.checkpoint(root / "german", seed=3, hidden=12)
    path = tiny.config_file(root / "tiny.py", data, teacher, student)
    lines = [
        f"    config.task.parallel_file = {str(write_pairs(root / 'pairs.jsonl'))!r}",
        f"    config.students.german = {dict(checkpoint=str(german), steps=1)!r}",
        "    config.objective.agree = {'base': 'monox_kd', 'data': 'parallel'}",
        "    config.objective.german = {'base': 'monox_kd', 'data': 'parallel', 'languages': ('de',),",
        "                               'student': 'german'}",
        "    config.objective.later = {'base': 'self_training', 'data': 'parallel', 'languages': ('fr',)}",
        "    config.objectives = ('vanilla', 'agree', 'german', 'later')",
    ]
    path.write_text(path.read_text().replace("    return config", "\n".join([*lines, "    return config"])))
    return path


def start(config_file, workdir, *flags):
    main.main(["--config", str(config_file), "--workdir", str(workdir), *FAST, *flags])


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("parallel") / "run"
    start(config_file, workdir)
    return workdir


def test_what_a_student_reads_and_whose_logits_each_text_takes():
    def pairs_of(language, *numbers):
        return Pairs(*([Example(f"{name}{i}", "text", None, -1, name) for i in numbers] for name in ("en", language)))

    pairs = {"de": pairs_of("de", 0, 2), "fr": pairs_of("fr", 1)}
    labelled = [Example("l", "text", None, 0, "en")]
    texts = TransferSet(labelled, [], [], (), parallel=pairs)
    both = Objective("both", data="parallel", teacher="monolingual")
    assert [example.id for example in texts.of(both)] == ["de0", "de2", "fr1", "en0", "en2", "en1"]
    assert texts.ids_for_teacher(both) == ["en0", "en2", "en1", "en0", "en2", "en1"]
    assert [example.id for example in texts.for_teacher(both)] == ["en0", "en2", "en1"]
    german = Objective("german", data="parallel", teacher="monolingual", languages=("de",))
    assert [example.id for example in texts.of(german)] == ["de0", "de2"]
    assert texts.ids_for_teacher(german) == ["en0", "en2"]
    taught = texts.for_monolingual_teacher([german, both, OBJECTIVES["monox_kd"]])
    assert [example.id for example in taught] == ["l", "en0", "en2", "en1"]
    assert texts.for_monolingual_teacher([OBJECTIVES["monox_kd"]]) == labelled
    assert [example.id for example in texts.for_monolingual_teacher([german])] == ["l", "en0", "en2"]


def test_the_teachers_label_originals_alone(finished):
    ids = [(path / "ids.txt").read_text().splitlines() for path in (finished / "logits").iterdir()]
    # Those of both languages, of German, and of French, the last by a student
    assert sorted(map(len, ids)) == [8, 8, 16]
    assert {tuple(id_.split("/")[1:3]) for store in ids for id_ in store} == {("parallel", "en")}


def test_each_student_is_scored_in_the_languages_that_it_knows(finished):
    scored = {}
    for row in tiny.rows_of(finished):
        scored.setdefault(row["objective"], set()).add(row["language"])
    everything = {"en", "de", "fr"}
    known = dict.fromkeys(("vanilla", "agree"), everything)
    assert scored == {"teacher": {"en"}, "german": {"de"}, "later": {"fr"}} | known
    metrics = finished / "students" / "german" / "seed-0" / "metrics.jsonl"
    assert "dev_accuracy" not in metrics.read_text()


def test_every_number_is_marked_and_none_is_the_headline(finished, capsys):
    report.main(["--workdir", str(finished)])
    table, page = ((finished / "report" / name).read_text() for name in ("results.md", "report.html"))
    for name in ("agree", "german", "later"):
        assert f"| {name} {MARK} |" in table
    assert f"vanilla {MARK}" not in table
    text = "uses target text: agree, german, later learned from translations in target languages"
    assert text in table and text in page
    assert table.splitlines()[2].startswith("| objective |")  # in place of a sentence about a gain


def test_a_comparison_says_so(finished):
    report.main(["--workdir", str(finished), "--compare", "agree", "vanilla"])
    compared = (finished / "report" / "compare-agree-vanilla.md").read_text()
    assert f"agree {MARK}" in compared and "uses target text: agree learned from translations in target" in compared


def test_a_headline_is_about_an_objective_without_target_text(config_file):
    known = definitions(load(str(config_file), list(FAST)))
    table = ResultsTable("any", "accuracy", "test", "source_dev", ("en",), ("de",), {}, {}, (), objectives=known)
    assert [name for name in known if table.may_be_headline(name)] == ["monox_kd", "monox_pl"]
    assert known["agree"].teacher == "monolingual"


def test_the_model_card_says_so(finished):
    def card(name):
        return model_card(find_run(Workdir(finished), name, 0, "source_dev"), tiny.rows_of(finished))

    german, agree = card("german"), card("agree")
    assert "**Uses target text.** This student has learned from translations in target languages" in german
    assert "It was trained on translations from en into de and is meant for de." in german
    assert "8 translations from en into de from a file, without labels." in german
    assert "8 translations from en into each of de and fr from a file and their originals" in agree
    assert "uses-target-text" in german and "zero-shot-transfer" not in german
    assert "translation" not in card("vanilla")


def test_it_resumes_and_refuses_another_file_or_size(config_file, finished, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.npy")}
    start(config_file, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.npy")} == before
    with pytest.raises(UserError, match=r"task\.parallel: 8 → 9"):
        start(config_file, finished, "--config.task.parallel=9")
    path = config_file.parent / "pairs.jsonl"
    content = path.read_bytes()
    try:
        path.write_bytes(content.replace(b"bon", b"BON"))
        with pytest.raises(UserError, match=r"other settings or data \(data: "):
            start(config_file, finished)
    finally:
        path.write_bytes(content)


def test_only_what_reads_translations_depends_on_them(config_file):
    configs = [load(str(config_file), [*FAST, f"--config.task.parallel={n}"]) for n in (8, 9)]
    same = {name: len({str(sharing.settings_of(one, name)) for one in configs}) == 1 for name in configs[0].objectives}
    assert same == {"vanilla": True, "agree": False, "german": False, "later": False}
    assert len({str(sharing.settings_of(one, "teacher")) for one in configs}) == 1


class StoppedError(Exception):
    pass


def logits_of(monkeypatch, config_file, workdir, *flags):
    """Start all students without training them, and return the logits that each would learn from, by example id."""
    seen = {}

    def train(self, directory, objective, dataset, *args, **kwargs):
        seen[objective.name] = dict(zip(dataset.ids, dataset.teacher_logits.tolist(), strict=True))

    def stop(*args):
        raise StoppedError

    monkeypatch.setattr(Finetuner, "train", train)
    monkeypatch.setattr(experiment, "evaluate", stop)
    with pytest.raises(StoppedError):
        start(config_file, workdir, *flags)
    return seen


def answers(rows, path, probability):
    """Write a file of logits with a probability for each row, and return it by id."""
    shares = {row["id"]: probability(number) for number, row in enumerate(rows)}
    lines = [{"id": id_, "probabilities": {"bad": 1 - share, "good": share}} for id_, share in shares.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return shares


def test_a_translation_takes_the_logits_of_its_original(monkeypatch, config_file, tmp_path):
    path = tmp_path / "soft.jsonl"
    flags = [f"--config.teacher.logits_file={path}", "--config.objectives=('monox_kd','agree','german')"]
    rows = list(transfer_rows(load(str(config_file), [*FAST, *flags])))
    originals = {row["id"] for row in rows if "/parallel/" in row["id"]}
    assert len(rows) == 64 + 16 and len(originals) == 16 and {row["language"] for row in rows} == {"en"}
    shares = answers(rows, path, lambda number: (number + 1) / 100)
    seen = logits_of(monkeypatch, config_file, tmp_path / "run", *flags)
    assert {name: len(logits) for name, logits in seen.items()} == {"monox_kd": 64, "agree": 32, "german": 8}
    for logits in seen.values():
        for id_, (bad, good) in logits.items():
            share = shares[id_.replace("/de/", "/en/").replace("/fr/", "/en/")]
            assert good - bad == pytest.approx(math.log(share / (1 - share)), abs=1e-5)
    numbers = [int(id_.rpartition("/")[2]) for id_ in seen["german"]]
    assert {id_.split("/")[2] for id_ in seen["german"]} == {"de"} and all(number % 2 == 0 for number in numbers)


def test_several_teachers_give_their_mean_of_the_originals(monkeypatch, config_file, tmp_path):
    config = tmp_path / "several.py"
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    lines = [
        f"    config.teacher.logits_file = {str(first)!r}",
        f"    config.teachers.second = {dict(logits_file=str(second))!r}",
        "    config.objectives = ('german',)",
        "    return config",
    ]
    config.write_text(config_file.read_text().replace("    return config", "\n".join(lines)))
    rows = list(transfer_rows(load(str(config), list(FAST))))
    ours, theirs = answers(rows, first, lambda number: 0.2), answers(rows, second, lambda number: 0.5 + number / 1000)
    seen = logits_of(monkeypatch, config, tmp_path / "run")["german"]
    assert len(seen) == 8
    for id_, (bad, good) in seen.items():
        original = id_.replace("/de/", "/en/")
        mean = (ours[original] + theirs[original]) / 2
        assert 1 / (1 + np.exp(bad - good)) == pytest.approx(mean, abs=1e-6)


def test_a_ready_made_opinion_needs_no_other_text(monkeypatch, config_file, tmp_path):
    data = tiny.write_task(tmp_path / "data", languages=("en", "de", "fr"))
    for name in ("train", "dev"):
        for path in data.glob(f"*/{name}.tsv"):
            path.unlink()
    path = tmp_path / "soft.jsonl"
    flags = [f"--config.teacher.logits_file={path}", f"--config.task.data_dir={data}", "--config.task.labelled=0"]
    flags += ["--config.task.labels=('bad','good')", "--config.task.unlabelled_from=none"]
    flags += ["--config.objectives=('agree','german')"]
    rows = list(transfer_rows(load(str(config_file), [*FAST, *flags])))
    assert len(rows) == 16
    answers(rows, path, lambda number: 0.3)
    describe_command.main(["--config", str(config_file), *FAST, *flags])
    assert set(logits_of(monkeypatch, config_file, tmp_path / "run", *flags)) == {"agree", "german"}
    with pytest.raises(UserError, match="no text to learn from in en"):
        check(load(str(config_file), [*FAST, *flags, "--config.objectives=('monox_kd','german')"]))


def test_a_teacher_without_originals_in_its_languages_is_left_out(monkeypatch, config_file, tmp_path):
    config, pairs = tmp_path / "several.py", tmp_path / "pairs.jsonl"
    write_pairs(pairs, languages=("de",))
    rows = [json.loads(line) | {"text_language": "en"} for line in pairs.read_text().splitlines()]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    lines = [
        f"    config.task.parallel_file = {str(pairs)!r}",
        "    config.task.source_languages, config.task.target_languages = ('en', 'fr'), ('de',)",
        f"    config.teacher.logits_file, config.teacher.languages = {str(first)!r}, ('en',)",
        f"    config.teachers.french = {dict(logits_file=str(second), languages=('fr',))!r}",
        "    config.objective.later.languages = ('de',)",
        "    config.objectives = ('german',)",
        "    return config",
    ]
    config.write_text(config_file.read_text().replace("    return config", "\n".join(lines)))
    rows = list(transfer_rows(load(str(config), list(FAST))))
    assert {row["language"] for row in rows} == {"en", "fr"}
    shares = answers(rows, first, lambda number: 0.2)
    answers(rows, second, lambda number: 0.9)
    seen = logits_of(monkeypatch, config, tmp_path / "run")["german"]
    assert len(seen) == 8 and set(shares.values()) == {0.2}
    assert all(1 / (1 + np.exp(bad - good)) == pytest.approx(0.2, abs=1e-6) for bad, good in seen.values())


def test_translations_are_read_only_if_an_objective_wants_them(config_file):
    config = load(str(config_file), list(FAST))
    sample = transfer_set.gather(config, load_task(config.task))
    assert {language: len(pairs.originals) for language, pairs in sample.parallel.items()} == {"de": 8, "fr": 8}
    german = load(str(config_file), [*FAST, "--config.objectives=('vanilla','german')"])
    assert set(transfer_set.gather(german, load_task(config.task)).parallel) == {"de"}
    none = load(str(config_file), [*FAST, "--config.objectives=('vanilla','monox_kd')"])
    assert not transfer_set.gather(none, load_task(config.task)).parallel


def test_the_description_has_the_pairs(config_file, capsys):
    describe_command.main(["--config", str(config_file), *FAST])
    page = capsys.readouterr().out
    rows = ["| none | de | P | 8 |", "| none | fr | P | 8 |", "| students.german | de | P | 8 |"]
    rows += ["| student | en | P | 16 |", "| students.german | P of german |", "| student | P of agree |"]
    assert [row for row in rows if row not in page] == []


def test_the_description_counts_test_texts_that_are_translations(config_file, tmp_path, capsys):
    tests = (config_file.parent / "data" / "de" / "test.tsv").read_text().splitlines()[1:]
    texts = [line.split("\t")[0] for line in tests]
    path = tmp_path / "pairs.tsv"
    path.write_text(f"text\ttranslation\tlanguage\ngood\t{texts[0]}\tde\ngood\tbon\tfr\n")
    describe_command.main(
        ["--config", str(config_file), *FAST, f"--config.task.parallel_file={path}", "--config.task.parallel=1"]
    )
    line = f"also in target text (P): {texts.count(texts[0])} of 17 in test de, 0 of 17 in test fr\n"
    assert line in capsys.readouterr().out


def test_the_definitions_say_what_they_read(config_file):
    known = definitions(load(str(config_file), list(FAST)))
    kinds = {name: kinds_of_target_text(known, name) for name in ("vanilla", "monox_kd", "agree", "german", "later")}
    assert kinds == dict.fromkeys(("vanilla", "monox_kd"), ()) | dict.fromkeys(
        ("agree", "german", "later"), ("translations",)
    )
    after = {**known, "after": Objective("after", data="target", teacher="later")}
    assert kinds_of_target_text(after, "after") == ("unlabelled text", "translations")
    assert describe(known["agree"]) == (
        "KL(the teacher's logits for the originals; T = 1) on translations into all target languages, and their "
        "originals"
    )
    assert (
        describe(known["later"]) == "KL(the vanilla student's logits for the originals; T = 1) on translations into fr"
    )
    assert known["german"].loss_settings() == known["monox_kd"].loss_settings()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.task.parallel_file="], r"task 'files' has no translations from en into 'de': name a file of them"),
        (["--config.task.parallel_file=no.tsv"], r"task\.parallel_file no\.tsv: no such file"),
        (["--config.task.parallel=99"], r"task\.parallel 99 is more than available in de: 10; 0 takes all"),
        (
            ["--config.objective.german.languages=('xx',)"],
            r"objective\.german\.languages has 'xx', which is none of the",
        ),
        (["--config.objective.german.data=all"], r"expected \(\) unless data is 'target' or 'parallel'"),
        (["--config.objective.agree.hard_weight=1"], r"hard_weight = 1\.0, expected 0 with data 'parallel', or pseudo"),
        (["--config.objective.agree.teacher=none"], r"teacher = 'none', expected 'monolingual' or another objective"),
        (["--config.objective.later.teacher=german"], r"later\.teacher is 'german', which knows de alone"),
        (
            ["--config.task.target_languages=('fr',)", "--config.objective.german.languages=('fr',)"],
            r"pairs\.jsonl:1: column 'language' is 'de', which is no target language \(fr\)",
        ),
        (["--config.students.german.patience=1"], r"students\.german\.patience uses the source language's dev split"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(config_file, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        check(load(str(config_file), [*FAST, *flags]))
    assert "\n" not in str(caught.value)
