"""Studies: loading, the comparison by hand, and a run of two variants on tiny files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny
from xtransfer.errors import BusyError, UserError
from xtransfer.evaluation.results import ObjectiveResults, ResultsTable, Summary
from xtransfer.runtime import locks
from xtransfer.study import comparison, design
from xtransfer.study.__main__ import main

RESULT_FIELDS = ("t", "accuracy", "test", "source_dev", ("en",), ("de",), {"en": 9, "de": 9}, {})


def results(teacher, vanilla, kd):
    """Return a table with one target language: the teacher's source score, and (source, target) of the students."""

    def line(name, source, target, gain):
        languages = {"en": Summary({0: source})} | ({} if target is None else {"de": Summary({0: target})})
        average = None if target is None else Summary({0: target})
        return ObjectiveResults(name, languages, average, None if gain is None else Summary({0: gain}))

    lines = (
        line("teacher", teacher, None, None),
        line("vanilla", *vanilla, None),
        line("monox_kd", *kd, kd[1] - vanilla[1]),
    )
    return ResultsTable(*RESULT_FIELDS, lines)


def test_comparison_by_hand():
    # Gains 0.10, 0.06 and 0.08: mean 0.08, sd 0.02. With two degrees of freedom t = 4.3027, so the half width is
    # 4.3027 · 0.02 / √3 = 0.0497.
    repetitions = [
        results(0.9, (0.7, 0.60), (0.8, 0.70)),
        results(0.8, (0.6, 0.50), (0.8, 0.56)),
        results(0.7, (0.5, 0.52), (0.8, 0.60)),
    ]
    table = comparison.table([comparison.compare("main", repetitions)])
    assert table.header == ("variant", "n", "teacher", "vanilla, source", "vanilla, targets", "monox_kd")
    assert table.rows == (("main", "3", "80.0 ± 10.0", "60.0 ± 10.0", "54.0 ± 5.3", "+8.0 [+3.0, +13.0]"),)
    (row,) = comparison.table([comparison.compare("one", repetitions[:1])]).rows
    assert row == ("one", "1", "90.0", "70.0", "60.0", "+10.0")


def test_a_variant_without_an_objective_has_no_value():
    with_kd = results(0.9, (0.7, 0.60), (0.8, 0.70))
    without = ResultsTable("t", "accuracy", "test", "source_dev", ("en",), ("de",), {}, {}, with_kd.lines[:2])
    table = comparison.table([comparison.compare("a", [with_kd]), comparison.compare("b", [without])])
    assert [row[-1] for row in table.rows] == ["+10.0", "–"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Return a study of one-step experiments in two variants, one of which pretrains its student first."""
    root = tmp_path_factory.mktemp("study")
    encoder = tiny.checkpoint(root / "encoder")
    data = tiny.write_task(root / "data", train=40)
    for language in ("en", "de"):
        (data / language / "unlabelled.tsv").write_text("text\nthe film is good\nder Film ist gut\n")
    base = tiny.config_file(root / "base.py", data, encoder, encoder, steps=2)
    (root / "pretraining.py").write_text(
        "from xtransfer import config as settings\n"
        "def get_config(arg=''):\n"
        "    config = settings.default(settings.PretrainConfig)\n"
        f"    config.task.name, config.task.data_dir = 'files', {str(data)!r}\n"
        f"    config.start_from, config.steps, config.row_length = {str(encoder)!r}, 1, 8\n"
        "    config.rows, config.masks = 8, 1\n"
        "    return config\n"
    )
    (root / "study.py").write_text(
        "from xtransfer.study.design import Study\n"
        "def get_study(arg=''):\n"
        "    fixed = (\"objectives=('vanilla','monox_kd')\", 'seeds=(0,)', 'teacher.steps=2')\n"
        f"    return Study(base={str(base)!r}, variants={{\n"
        "        'plain': [(*fixed, f'task.labelled_seed={i}') for i in range(2)],\n"
        "        'more': [(*fixed, 'student.checkpoint={pretrained}')],\n"
        f"    }}, pretrained={{'pretrained': ({str(root / 'pretraining.py')!r}, ('seed=1',))}})\n"
    )
    return root / "study.py"


def test_a_study_runs_and_resumes(config_file, tmp_path, capsys):
    flags = ["--config", str(config_file), "--workdir", str(tmp_path / "runs"), "--variants", "plain"]
    subprocess.run([sys.executable, "-m", "xtransfer.study", *flags], check=True, timeout=240)
    assert not (tmp_path / "runs" / "pretrained").exists()
    main(["--config", str(config_file), "--workdir", str(tmp_path / "runs")])
    text = (tmp_path / "runs" / "study.md").read_text()
    assert "| plain | 2 |" in text and "| more | 1 |" in text
    rows = [json.loads(line) for line in (tmp_path / "runs" / "study.jsonl").read_text().splitlines()]
    # Source scores of teacher and two students, targets of two students, and one gain.
    assert sum(row["variant"] == "plain" for row in rows) == 2 * (3 + 2 + 1)
    config = json.loads((tmp_path / "runs" / "more" / "0" / "config.json").read_text())
    assert config["student"]["checkpoint"] == str(tmp_path / "runs" / "pretrained" / "pretrained")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")}
    capsys.readouterr()
    main(["--config", str(config_file), "--workdir", str(tmp_path / "runs")])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")}
    printed = capsys.readouterr().out
    assert "Variants of the experiment" in printed and "gains over vanilla in points" in " ".join(printed.split())
    # A part of the study keeps the other variants in the table, and another recipe is refused.
    main([*flags])
    assert "| more | 1 |" in (tmp_path / "runs" / "study.md").read_text()
    changed = config_file.read_text().replace("('seed=1',)", "('seed=2',)")
    (tmp_path / "changed.py").write_text(changed)
    with pytest.raises(UserError, match="seed: 1 → 2"):
        main(["--config", str(tmp_path / "changed.py"), "--workdir", str(tmp_path / "runs")])
    # A repetition that fails is named, and the others are finished.
    (tmp_path / "failing.py").write_text(config_file.read_text().replace("labelled_seed={i}'", "labelled={i * 1000}'"))
    with pytest.raises(UserError, match="1 repetitions failed; the first is plain 1: task.labelled 1000"):
        main(["--config", str(tmp_path / "failing.py"), "--workdir", str(tmp_path / "other")])
    assert "| more | 1 |" in (tmp_path / "other" / "study.md").read_text()


def test_a_second_study_is_refused_and_the_first_is_named(config_file, tmp_path):
    root = tmp_path / "runs"
    with locks.directory_lock(root), pytest.raises(BusyError, match=f"{root} is in use by process "):
        main(["--config", str(config_file), "--workdir", str(root)])
    assert [path.name for path in root.iterdir()] == [".run.lock"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "study.py has no function get_study; pass a study such as configs/studies/claim.py"),
        ("def get_study(arg): return 3", "get_study returned int, not a Study"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_wrong_config_is_a_one_line_error(content, message, tmp_path):
    (tmp_path / "study.py").write_text(content)
    with pytest.raises(UserError, match=message):
        design.load(str(tmp_path / "study.py"))


def test_unknown_names_are_refused(config_file, tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        design.load(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="--variants plane: not one of plain, more; did you mean 'plain'"):
        main(["--config", str(config_file), "--workdir", str(tmp_path), "--variants", "plane"])


def test_the_shipped_study_loads_with_all_of_its_experiments():
    from xtransfer import config

    shipped = design.load("configs/studies/claim.py:dev")
    directories = {name: Path("/nowhere") / name for name in shipped.pretrained}
    for repetitions in shipped.variants.values():
        for flags in repetitions:
            config.load(shipped.base, design.with_directories(flags, directories))
    for source, flags in shipped.pretrained.values():
        config.load(source, design.with_directories(flags, directories), config.PretrainConfig)
    assert len(design.encoders_of(shipped, ["main"])) == 4
    assert len(shipped.variants["main"]) == 15


def test_only_names_of_encoders_are_replaced():
    flags = ("task.path={language}/{split}.tsv", "student.checkpoint={a}")
    assert design.with_directories(flags, {"a": Path("/x")}) == [
        "--config.task.path={language}/{split}.tsv",
        "--config.student.checkpoint=/x",
    ]


def test_an_encoder_that_another_recipe_starts_from_is_pretrained_too():
    study = design.Study(
        base="b.py",
        variants={"v": [("student.checkpoint={b}",)], "w": [()]},
        pretrained={"a": ("p.py", ()), "b": ("p.py", ("start_from={a}",)), "c": ("p.py", ())},
    )
    assert design.encoders_of(study, ["v"]) == ["a", "b"]
    assert design.encoders_of(study, ["w"]) == []


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{'../x': [()]}", r"'../x' cannot be the name"),
        ("{'pretrained': [()]}", "'pretrained' cannot be the name"),
        ("{'x.work': [()]}", "'x.work' cannot be the name"),
        ("{'x': []}", "variant 'x' has no repetition"),
    ],
)
def test_impossible_variants_are_refused(variants, message, tmp_path):
    (tmp_path / "study.py").write_text(
        "from xtransfer.study.design import Study\n"
        f"def get_study(arg): return Study(base='configs/quickstart.py', variants={variants})\n"
    )
    with pytest.raises(UserError, match=message):
        design.load(str(tmp_path / "study.py"))


def test_a_comparison_without_the_baseline_has_no_value():
    lines = results(0.9, (0.7, 0.60), (0.8, 0.70)).lines
    only_kd = (lines[0], ObjectiveResults("monox_kd", lines[2].languages, lines[2].average, None))
    table = comparison.table([comparison.compare("a", [ResultsTable(*RESULT_FIELDS, only_kd)])])
    assert table.rows == (("a", "1", "90.0", "–", "–"),)
