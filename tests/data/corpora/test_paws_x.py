"""PAWS-X treats quotes as characters, skips untranslated sentences, and names its labels."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import archive_writers
from xtransfer.config import TaskConfig
from xtransfer.data.corpora import loader, paws_x
from xtransfer.data.corpora.corpus import CorpusRow, Skipped
from xtransfer.data.task import Example
from xtransfer.errors import UserError

(PAWS,) = paws_x.CORPORA
HEADER = "id\tsentence1\tsentence2\tlabel\n"
# A CSV reader would take an unclosed quote to continue over the following lines.
ENGLISH = (
    HEADER + "1\tThe river runs from A to B .\tThe river runs from B to A .\t0\n"
    '2\t" Moon " was his first book .\t" Moon was his first book .\t1\n'
    "3\tHe sang `` Home '' in May .\tIn May he sang `` Home '' .\t1\n"
)
GERMAN = (
    HEADER + "1\tDer Fluss fließt von A nach B.\tNS\t0\n"
    "2\tNS\tNS\t1\n"
    '3\tEr sang im Mai "Home.\tIm Mai sang er "NS".\t1\n'
)
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\t"), max_size=12)


def parse(content: str | bytes) -> list[CorpusRow | Skipped]:
    return list(paws_x.parse(io.BytesIO(archive_writers.encoded(content)), "x-final/de/dev_2k.tsv"))


def test_quotes_are_ordinary_characters_and_labels_are_named():
    assert [(r.id, r.text, r.text_pair, r.label) for r in parse(ENGLISH) if isinstance(r, CorpusRow)] == [
        ("1", "The river runs from A to B .", "The river runs from B to A .", "different"),
        ("2", '" Moon " was his first book .', '" Moon was his first book .', "paraphrase"),
        ("3", "He sang `` Home '' in May .", "In May he sang `` Home '' .", "paraphrase"),
    ]


def test_untranslated_sentences_are_skipped_with_a_reason():
    assert parse(GERMAN) == [
        Skipped("x-final/de/dev_2k.tsv:2", "not translated (NS)"),
        Skipped("x-final/de/dev_2k.tsv:3", "not translated (NS)"),
        CorpusRow("3", 'Er sang im Mai "Home.', 'Im Mai sang er "NS".', "paraphrase", "x-final/de/dev_2k.tsv:4"),
    ]


@given(st.lists(st.tuples(cells, cells, cells, st.sampled_from("01"))))
def test_every_row_is_read_or_skipped(rows):
    parsed = parse(HEADER + "".join("\t".join(row) + "\n" for row in rows))
    assert len(parsed) == len(rows)
    for row, (number, first, second, label) in zip(parsed, rows, strict=True):
        if "NS" in (first.strip(), second.strip()):
            assert isinstance(row, Skipped)
        else:
            assert isinstance(row, CorpusRow)
            assert (row.id, row.text, row.text_pair, row.label) == (number, first, second, paws_x.LABELS[int(label)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ENGLISH + "4\ta\tb\t2\n", "dev_2k.tsv:5: label '2' is not 0 or 1"),
        (ENGLISH + "4\ta\tb\t\n", "dev_2k.tsv:5: label '' is not 0 or 1"),
        (ENGLISH + "4\ta\tb\n", "dev_2k.tsv:5: 3 columns, expected 4"),
        ("id\tsentence1\tsentence\tlabel\n1\ta\tb\t0\n", "dev_2k.tsv:2: no column 'sentence2'"),
        (ENGLISH.encode() + b"4\t\xff\tb\t1\n", "dev_2k.tsv:5: byte 0xff is not UTF-8"),
    ],
)
def test_errors_for_malformed_files_name_the_line(content, message):
    with pytest.raises(UserError) as caught:
        parse(content)
    assert message in str(caught.value)


def test_the_task_loads_from_the_archive(tmp_path: Path, caplog):
    archive_writers.write_tar_gz(
        tmp_path / "x-final.tar.gz",
        {
            "x-final/en/train.tsv": ENGLISH,
            "x-final/en/dev_2k.tsv": ENGLISH,
            "x-final/en/test_2k.tsv": ENGLISH,
            "x-final/de/translated_train.tsv": "not read",
            "x-final/de/dev_2k.tsv": GERMAN,
            "x-final/de/test_2k.tsv": GERMAN,
        },
    )
    settings = TaskConfig("paws_x", str(tmp_path), str(tmp_path / "cache"), target_languages=("de",))
    task = loader.task(PAWS, settings)
    assert len(task.load("train", "en")) == 3 and len(task.load("dev", "en")) == 3
    assert task.load("test", "de") == [
        Example("paws_x/test/de/3", 'Er sang im Mai "Home.', 'Im Mai sang er "NS".', 1, "de")
    ]
    assert (
        "paws_x/de: 2 rows of test left out (not translated (NS)), the first at x-final/de/test_2k.tsv:2" in caplog.text
    )
    with pytest.raises(UserError, match="paws_x has no train split in de"):
        task.load("train", "de")
