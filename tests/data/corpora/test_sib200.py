"""SIB-200 files are read with the quoting of pandas, the columns, and the folder layout of the release."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import archive_writers
from xtransfer.config import TaskConfig
from xtransfer.data.corpora import loader, sib200
from xtransfer.data.corpora.corpus import CorpusRow
from xtransfer.data.task import Example
from xtransfer.errors import UserError

(SIB,) = sib200.CORPORA

# As in the real files, a cell that contains quotes is quoted, and its quotes are doubled.
ENGLISH = (
    "index_id\tcategory\ttext\n"
    "431\tgeography\tThe lake lies between two hills, and a road leads around it.\n"
    '1239\tentertainment\t"""It was a song for my sister,"" the singer said."\n'
    '76\tpolitics\t"He spoke of the ""settled"" matter."\n'
    "9\tscience/technology\tA cell's wall keeps water in.\n"
)
GERMAN = (
    "index_id\tcategory\ttext\r\n"
    "431\tgeography\tDer See liegt zwischen zwei Hügeln, und eine Straße führt um ihn herum.\r\n"
    "1239\tentertainment\t„Es war ein Lied für meine Schwester“, sagte die Sängerin.\r\n"
)
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=20)


def parse(content: str | bytes) -> list[CorpusRow]:
    return list(sib200.parse(io.BytesIO(archive_writers.encoded(content)), "eng_Latn/test.tsv"))


def error_message(content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        parse(content)
    return str(caught.value)


def test_quoted_cells_are_unquoted():
    assert [(row.id, row.label, row.text) for row in parse(ENGLISH)] == [
        ("431", "geography", "The lake lies between two hills, and a road leads around it."),
        ("1239", "entertainment", '"It was a song for my sister," the singer said.'),
        ("76", "politics", 'He spoke of the "settled" matter.'),
        ("9", "science/technology", "A cell's wall keeps water in."),
    ]
    assert [row.where for row in parse(ENGLISH)] == [f"eng_Latn/test.tsv:{line}" for line in range(2, 6)]
    assert [row.text[-7:] for row in parse("\ufeff" + GERMAN)] == [" herum.", "ngerin."]


@given(st.lists(st.tuples(cells, cells, cells)))
def test_rows_written_like_pandas_are_read_back(rows):
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=csv.QUOTE_MINIMAL, lineterminator="\n").writerows([sib200.COLUMNS, *rows])
    assert [(row.id, row.label, row.text) for row in parse(out.getvalue())] == rows


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_with_one_line(data):
    try:
        parse(b"index_id\tcategory\ttext\n" + data)
    except UserError as error:
        assert str(error).startswith("eng_Latn/test.tsv:") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index_id\ttext\tcategory\n", "test.tsv:1: the columns are index_id, text, category, expected index_id, cat"),
        (ENGLISH + "7\ttravel\n", "test.tsv:6: 2 columns, expected 3"),
        (ENGLISH + "7\ttravel\ta\tb\n", "test.tsv:6: 4 columns, expected 3"),
        (ENGLISH + "\n", "test.tsv:6: 0 columns, expected 3"),
        (ENGLISH + '7\ttravel\t"not closed\n8\ttravel\tnext"\n', "test.tsv:6: malformed TSV"),
        (ENGLISH + '7\ttravel\t"closed" early\n', "test.tsv:6: malformed TSV"),
        (ENGLISH.encode() + b"7\ttravel\t\xe9\n", "test.tsv:6: byte 0xe9 is not UTF-8"),
    ],
)
def test_errors_for_malformed_files_name_the_line(content, message):
    assert message in error_message(content)


def make_files(**changes: str) -> dict[str, str]:
    """Return the content of each file by its path, with some replaced."""
    contents = {
        f"{language}/{split}.tsv": content
        for language, content in (("eng_Latn", ENGLISH), ("deu_Latn", GERMAN))
        for split in sib200.SPLITS
    }
    return contents | changes


@pytest.mark.parametrize("kind", archive_writers.WRITERS)
@pytest.mark.parametrize("top", ["", "sib-200-main/data/annotated/"])
def test_the_task_loads_from_an_archive_or_folder(tmp_path: Path, kind: str, top: str):
    source = archive_writers.WRITERS[kind](
        tmp_path / "data", {top + name: content for name, content in make_files().items()}
    )
    config = TaskConfig(
        name="sib200",
        data_dir=str(source),
        cache_dir=str(tmp_path / "cache"),
        source_language="eng_Latn",
        target_languages=("deu_Latn",),
    )
    task = loader.task(SIB, config)
    text = "„Es war ein Lied für meine Schwester“, sagte die Sängerin."
    label = task.labels.index("entertainment")
    assert task.load("test", "deu_Latn")[1] == Example("sib200/test/deu_Latn/1239", text, None, label, "deu_Latn")
    assert [len(task.load(split, "eng_Latn")) for split in sib200.SPLITS] == [4, 4, 4]


def test_an_unknown_category_or_a_duplicate_id_is_an_error(tmp_path: Path):
    for extra, message in (
        ("7\tgeographie\tx\n", r"deu_Latn/test\.tsv:4: label 'geographie' is not one of .*; did you mean 'geography'"),
        ("431\tgeography\tx\n", r"deu_Latn/test\.tsv:4: id '431' occurs twice in test of deu_Latn"),
    ):
        archive_writers.write_folder(tmp_path / "data", make_files(**{"deu_Latn/test.tsv": GERMAN + extra}))
        config = TaskConfig(
            name="sib200",
            data_dir=str(tmp_path / "data"),
            cache_dir=str(tmp_path / "cache"),
            source_language="eng_Latn",
        )
        with pytest.raises(UserError, match=message):
            loader.task(SIB, config).load("test", "deu_Latn")


def test_the_corpus_declares_its_languages_labels_and_downloads():
    assert len(set(sib200.LANGUAGES)) == 205 and list(sib200.LANGUAGES) == sorted(sib200.LANGUAGES)
    assert len(sib200.LABELS) == 7
    scripts = {tag.partition("_")[2] for tag in sib200.LANGUAGES}
    assert all(len(tag.partition("_")[0]) == 3 for tag in sib200.LANGUAGES) and all(len(name) == 4 for name in scripts)
    filenames = [download.filename for download in SIB.downloads("jpn_Jpan")]
    assert filenames == ["jpn_Jpan/train.tsv", "jpn_Jpan/dev.tsv", "jpn_Jpan/test.tsv"]
    for requested, suggestion in {"en": "eng_Latn", "deu": "deu_Latn", "English": "eng_Latn"}.items():
        message = (
            f"source_language '{requested}': set it to '{suggestion}'; "
            "sib200 has train in eng_Latn, ace_Arab, .* and 185 more"
        )
        with pytest.raises(UserError, match=message):
            loader.task(SIB, TaskConfig(name="sib200", source_language=requested))
