"""The printed description: every number is in its place, on a terminal and as Markdown."""

import dataclasses
import io
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.helpers import tiny
from xtransfer.data.batches.measures import Filling, Lengths
from xtransfer.describe import __main__ as describe
from xtransfer.describe import tables
from xtransfer.describe.dataset import Description, MeasuredSet, PackedTraining, SetSize, ShownExample
from xtransfer.errors import UserError
from xtransfer.runtime import terminal

DESCRIPTION = Description(
    task="reviews",
    synthetic=False,
    source_language="en",
    target_languages=("de", "ja"),
    labels=("bad", "so|so"),
    evaluation_splits=("test",),
    unlabelled_from="split",
    models={"teacher": "mono, up to 128 tokens", "student": "multi, up to 64 tokens"},
    objectives={"teacher": "CE(labels) on labelled text", "mix": "KL(the teacher's logits; T = 2) on labelled text"},
    devices=8,
    counts=(
        SetSize("en", "L", 40, (20, 20), 0),
        SetSize("en", "U", 2000, (0, 0), 2000),
        SetSize("en", "train", 4000, (1000, 3000), 0),
        SetSize("en", "dev", 80, (20, 60), 0),
        SetSize("en", "test", 200, (50, 150), 0),
        SetSize("en", "unlabelled", 2000, (0, 0), 2000),
        SetSize("de", "test", 200, (50, 150), 0),
        SetSize("ja", "test", 400, (60, 340), 0),
    ),
    missing=("train split in de, ja: reviews has none [there]",),
    repeated={"L ∪ U": 7, "dev": 0, "test": 3},
    measured=(
        MeasuredSet("teacher", "en", "L", Lengths(40, (20, 90, 130, 1311), 3, 1000, 800, "word", 0.0)),
        MeasuredSet("student", "ja", "test", Lengths(400, (20, 40, 64, 65), 1, 9000, 12000, "character", 0.25)),
    ),
    packing=(PackedTraining("student", "L ∪ U", 2040, 1.57, 32, 64, Filling(((16, 90), (24, 10)), 0.9312, 0.4)),),
    examples=(
        ShownExample(
            "reviews/train/en/1", "bad", "Not [good]", None, {"teacher": "[CLS] not", "student": "[CLS] [UNK]"}
        ),
        ShownExample("reviews/test/de/1", "so|so", "Na ja", "oder", {"student": "[CLS] na"}),
    ),
)


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the level of a logger that the command silences for its own process."""
    yield
    logging.getLogger("xtransfer.data.tokens.tokenizer").setLevel(logging.NOTSET)


def on_terminal(monkeypatch: pytest.MonkeyPatch, description: Description, width: int = 120) -> str:
    """Return the description as printed on a terminal, without styles."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, highlight=False, soft_wrap=True, no_color=True)
    monkeypatch.setattr(terminal, "console", console)
    describe.show(description)
    text = output.getvalue()
    for code in ("\x1b[1m", "\x1b[0m"):
        text = text.replace(code, "")
    assert "\x1b" not in text
    return text


def rows_of(page: str, title: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its header and rule."""
    lines = page.split(f"## {title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("| ").replace("\\|", "¦").split(" | ")] for line in lines[2:]]


def test_markdown() -> None:
    page = describe.markdown(DESCRIPTION)
    assert page.startswith("# reviews: en → de, ja\n\n- teacher: mono, up to 128 tokens\n")
    training = "- training text: 40 labelled and 2,000 unlabelled (U: split) examples in en; 80 dev examples select the"
    assert training in page
    assert (
        "repeated texts: 7 of 2,040 within L ∪ U; texts that are also in L ∪ U: 0 of 80 in dev, 3 of 200 in test\n"
        in page
    )
    assert "\n- loss of mix: KL(the teacher's logits; T = 2) on labelled text\n" in page
    assert rows_of(page, "Splits") == [
        ["en", "4,000", "80", "200", "2,000"],
        ["de", "–", "–", "200", "–"],
        ["ja", "–", "–", "400", "–"],
    ]
    assert "- no train split in de, ja: reviews has none [there]\n" in page
    assert rows_of(page, "Labels") == [
        ["bad", "1,000 (25.0%)", "20 (50.0%)", "20 (25.0%)", "50 (25.0%)", "50–60 (15.0%–25.0%)"],
        ["so¦so", "3,000 (75.0%)", "20 (50.0%)", "60 (75.0%)", "150 (75.0%)", "150–340 (75.0%–85.0%)"],
    ]
    assert rows_of(page, "Lengths") == [
        ["teacher", "en", "L", "40", "20", "90", "130", "1,311", "7.5%", "1.25", "0.0%"],
        ["student", "ja", "test", "400", "20", "40", "64", "65", "0.2%", "0.75 *", "25.0%"],
    ]
    assert "the teacher reads" not in page
    assert "- * tokens per character" in page and "- few tokens per word and many unknown tokens" in page
    assert rows_of(page, "Training batches") == [
        ["student", "L ∪ U", "16 (90), 24 (10)", "2,040", "1.6", "32", "64", "93.1%", "40.0%"]
    ]
    assert "on 8 devices" in page
    assert (
        "    id        reviews/test/de/1\n    label     so|so\n    text      Na ja\n    second    oder\n    stud"
        in page
    )


def test_notes_appear_only_if_they_apply() -> None:
    page = describe.markdown(dataclasses.replace(DESCRIPTION, measured=DESCRIPTION.measured[:1], devices=1, missing=()))
    assert "per character" not in page and "few tokens" not in page and "on 1 device," in page and "- no " not in page


def test_note_on_the_teacher_in_other_languages() -> None:
    teacher, student = DESCRIPTION.measured
    measured = (teacher, dataclasses.replace(student, role="teacher"), student)
    description = dataclasses.replace(DESCRIPTION, measured=measured)
    page = describe.markdown(description)
    assert [row[:2] for row in rows_of(page, "Lengths")] == [["teacher", "en"], ["teacher", "ja"], ["student", "ja"]]
    assert "- the teacher reads en only; its other rows compare the tokenizers\n" in page


def test_examples_without_a_label_have_their_own_row() -> None:
    counts = tuple(SetSize("de", "test", 200, (50, 149), 1) if c.language == "de" else c for c in DESCRIPTION.counts)
    rows = rows_of(describe.markdown(dataclasses.replace(DESCRIPTION, counts=counts)), "Labels")
    assert rows[2] == ["none", "0 (0.0%)", "0 (0.0%)", "0 (0.0%)", "0 (0.0%)", "0–1 (0.0%–0.5%)"]


def test_title_of_synthetic_text_and_many_languages() -> None:
    many = tuple(f"l{i}" for i in range(6))
    counts = (*DESCRIPTION.counts[:6], *(SetSize(name, "test", 200, (50, 150), 0) for name in many))
    description = dataclasses.replace(DESCRIPTION, synthetic=True, target_languages=many, counts=counts)
    page = describe.markdown(description)
    assert page.startswith("# reviews (synthetic): en → 6 languages\n") and "| test (6 languages) |" in page
    assert rows_of(page, "Labels")[0][-1] == "50 (25.0%)"


def test_no_target_language_and_no_unlabelled_text() -> None:
    counts = (DESCRIPTION.counts[0], SetSize("en", "U", 0, (0, 0), 0), *DESCRIPTION.counts[2:5])
    page = describe.markdown(dataclasses.replace(DESCRIPTION, target_languages=(), counts=counts))
    assert page.startswith("# reviews: en → no other language\n")
    assert "training text: 40 labelled examples in en;" in page
    assert rows_of(page, "Labels")[0][-1] == "–"


def test_terminal_shows_everything_in_120_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, DESCRIPTION)
    assert max(map(len, text.splitlines())) <= 120
    words = text.split()
    for table in tables.tables(DESCRIPTION):
        for row in table.rows:
            assert all(word in words for cell in row for word in cell.split()), row
    for example in DESCRIPTION.examples:
        assert all(value in text for _, value in tables.fields(example))
    assert "reviews has none [there]" in text and "Not [good]" in text


def test_narrow_terminal_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = on_terminal(monkeypatch, DESCRIPTION, width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    wide = on_terminal(monkeypatch, DESCRIPTION)
    assert Counter("".join(narrow.split()).replace("─", "")) == Counter("".join(wide.split()).replace("─", ""))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the flags of a tiny experiment."""
    root = tmp_path_factory.mktemp("tiny")
    data, checkpoint = tiny.write_task(root / "data"), tiny.checkpoint(root / "model")
    config = tiny.config_file(root / "tiny.py", data, checkpoint, checkpoint)
    return ["--config", str(config), f"--config.task.cache_dir={root / 'cache'}"]


def test_command_line(flags: list[str], tmp_path: Path) -> None:
    """In a pipe the output is Markdown, and --json writes a file."""
    command = [sys.executable, "-m", "xtransfer.describe", *flags, "--batches", "2", "--json", str(tmp_path / "f.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# files: en → de\n") and "| en | 64 | 16 | 17 |" in done.stdout
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["counts"][0] == {
        "language": "en",
        "name": "L",
        "examples": 40,
        "labels": [20, 20],
        "without_label": 0,
    }
    assert [sum(count for _, count in packing["filling"]["rows"]) for packing in report["packing"]] == [2, 2, 2]
    assert report["measured"][-1]["language"] == "de" and len(report["examples"]) == 6


def test_user_error_is_one_line(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["describe", *flags, "--config.task.source_language=it"])
    with pytest.raises(SystemExit) as raised:
        terminal.run(describe.main)
    out, error = capsys.readouterr()
    assert raised.value.code == 2 and out == ""
    assert error.startswith("error: task.source_language: no data in 'it'") and error.count("\n") == 1


@pytest.mark.parametrize("number", ["0", "-3"])
def test_batches_must_be_positive(flags: list[str], number: str) -> None:
    with pytest.raises(UserError, match="--batches is .*; expected 1 or more"):
        describe.main([*flags, "--batches", number])


def test_unwritable_json_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.json cannot be written"):
        describe.main(["--config", "nothing.py", "--json", str(tmp_path / "file" / "x.json")])
