"""XNLI and MultiNLI pairs are read from files in the exact format of the release, and errors name file and line."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import archive_writers
from xtransfer.config import TaskConfig
from xtransfer.data import blank
from xtransfer.data.corpora import loader, xnli
from xtransfer.data.corpora.corpus import CorpusRow, Skipped, Sources
from xtransfer.data.corpora.tfds_builder import checked_rows
from xtransfer.errors import UserError

XNLI_HEADER = (
    "language\tgold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
    "sentence2\tpromptID\tpairID\tgenre\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tsentence1_tokenized\t"
    "sentence2_tokenized\tmatch"
)
MULTINLI_HEADER = (
    "gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\t"
    "promptID\tpairID\tgenre\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5"
)

Pair = tuple[str, str, str, str]  # language, label, premise, hypothesis


def xnli_tsv(*pairs: Pair) -> bytes:
    """Return the file of these pairs. Each language numbers its pairs from 1, and the parses are empty."""
    lines, counts = [XNLI_HEADER], dict.fromkeys(xnli.LANGUAGES, 0)
    for language, label, first, second in pairs:
        counts[language] = number = counts.get(language, 0) + 1
        votes = "\t".join([label] * 5)
        lines.append(
            f"{language}\t{label}\t\t\t\t\t{first}\t{second}\t{(number + 2) // 3}\t{number}\tfacetoface\t{votes}\t"
            f"{first}\t{second}\tTrue"
        )
    return "".join(f"{line}\n" for line in lines).encode()


def xnli_jsonl(*pairs: Pair) -> bytes:
    rows = [line.split("\t") for line in xnli_tsv(*pairs).decode().split("\n")[:-1]]
    return jsonl(*(dict(zip(rows[0], row, strict=True)) for row in rows[1:]))


def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def multinli_txt(*pairs: tuple[str, str, str], votes: str = "\t\t\t\t") -> bytes:
    """Return the training file of these pairs. In the release, four empty cells follow the one vote."""
    lines = [MULTINLI_HEADER]
    for number, (label, first, second) in enumerate(pairs):
        parses = f"( {first} )\t( {second} )\t(ROOT {first})\t(ROOT {second})"
        lines.append(f"{label}\t{parses}\t{first}\t{second}\t{number}\t{number}n\tfiction\t{label}{votes}")
    return "".join(f"{line}\n" for line in lines).encode()


def multinli_jsonl(*pairs: tuple[str, str, str]) -> bytes:
    rows = []
    for number, (label, first, second) in enumerate(pairs):
        row = {"annotator_labels": [label], "genre": "fiction", "gold_label": label}
        row |= {"pairID": f"{number}n", "promptID": f"{number}"}
        row |= {"sentence1": first, "sentence1_binary_parse": f"( {first} )", "sentence1_parse": f"(ROOT {first})"}
        row |= {"sentence2": second, "sentence2_binary_parse": f"( {second} )", "sentence2_parse": f"(ROOT {second})"}
        rows.append(row)
    return jsonl(*rows)


def parse(data: bytes, language: str = "", member: str = "a.tsv") -> list[CorpusRow | Skipped]:
    stream = io.BytesIO(data)
    return list(xnli.parse_xnli(stream, member, language) if language else xnli.parse_multinli(stream, member))


def pairs_of(parsed: list[CorpusRow | Skipped]) -> list[tuple[str, str, str, str]]:
    return [(row.id, row.label, row.text, row.text_pair) for row in parsed if isinstance(row, CorpusRow)]


def error_message(data: bytes, language: str = "", member: str = "a.tsv") -> str:
    with pytest.raises(UserError) as caught:
        parse(data, language, member)
    message = str(caught.value)
    assert message.startswith(member) and "\n" not in message
    return message.removeprefix(member)


# A cell cannot contain the characters that end it.
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r"), max_size=10)
sentences = cells.filter(lambda text: not blank.is_empty(text))
labels = st.sampled_from(["entailment", "neutral", "contradiction", "-"])
pairs = st.lists(st.tuples(st.sampled_from(["en", "sw", "zh"]), labels, sentences, sentences), min_size=1, max_size=8)


def expected_pairs(rows: list[Pair], language: str) -> list[tuple[str, str, str, str]]:
    in_language = [(label, first, second) for tag, label, first, second in rows if tag == language]
    return [
        (str(number), label, first, second)
        for number, (label, first, second) in enumerate(in_language, 1)
        if label != "-"
    ]


@given(pairs, st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_xnli_round_trip(rows, bom, newline):
    tsv = xnli_tsv(*rows).replace(b"\n", newline.encode())
    tsv = b"\xef\xbb\xbf" + tsv if bom else tsv
    for language in {row[0] for row in rows}:
        parsed = parse(tsv, language)
        assert pairs_of(parsed) == expected_pairs(rows, language)
        undecided = sum(row[:2] == (language, "-") for row in rows)
        assert sum(isinstance(row, Skipped) for row in parsed) == undecided
        assert pairs_of(parse(xnli_jsonl(*rows), language, "a.jsonl")) == expected_pairs(rows, language)


@given(st.lists(st.tuples(labels, sentences, sentences), min_size=1, max_size=8), st.integers(0, 4))
def test_multinli_round_trip(rows, empty_cells):
    expected = [
        (str(number), label, first, second) for number, (label, first, second) in enumerate(rows) if label != "-"
    ]
    for data, member in [
        (multinli_txt(*rows, votes="\t" * empty_cells), "a.txt"),
        (multinli_jsonl(*rows), "a.jsonl"),
    ]:
        parsed = parse(data, member=member)
        assert pairs_of(parsed) == expected and len(parsed) == len(rows)


@given(st.binary(max_size=60) | cells.map(str.encode), st.sampled_from(["a.tsv", "a.txt", "a.jsonl"]), st.booleans())
def test_any_bytes_are_read_or_refused_with_one_line(content, member, complete):
    write = multinli_jsonl if member == "a.jsonl" else multinli_txt
    data = write(("neutral", "@", "b")).replace(b"@", content)
    try:
        parsed = parse(data if complete else data[: len(data) * 2 // 3] + content, member=member)
    except UserError as error:
        assert str(error).startswith(member) and "\n" not in str(error)
    else:
        assert parsed or not complete


def test_quotes_are_ordinary_characters():
    rows = [("en", "neutral", '"Half a quote', 'no "end'), ("en", "entailment", '""', "'")]
    assert pairs_of(parse(xnli_tsv(*rows), "en")) == [
        ("1", "neutral", '"Half a quote', 'no "end'),
        ("2", "entailment", '""', "'"),
    ]
    txt = multinli_txt(("neutral", '"a', 'b"'), ("entailment", 'c"', '"d'))
    assert [row[2:] for row in pairs_of(parse(txt, member="a.txt"))] == [('"a', 'b"'), ('c"', '"d')]


def test_only_a_line_feed_ends_a_line():
    odd = "a\u2028b\u0085c\x0bd"
    assert pairs_of(parse(xnli_tsv(("en", "neutral", odd, odd)), "en")) == [("1", "neutral", odd, odd)]


def builder_rows(tmp_path: Path, member: str, data: bytes, language: str = "en", *, empty_text: str = "error") -> list:
    """Return the rows that the builder takes from a folder with one file."""
    (tmp_path / member).write_bytes(data)
    sources = Sources(dict.fromkeys(["XNLI-1.0.zip", "multinli_1.0.zip"], tmp_path))
    split = member.split(".")[1] if member.startswith("xnli") else "train"
    return list(checked_rows(xnli.CORPORA[0], sources, language, split, empty_text))


def test_labels_are_read_by_name(tmp_path):
    """Numbers are refused, because three orders of the classes are in use."""
    assert xnli.CORPORA[0].labels == ("entailment", "neutral", "contradiction")
    for label in ("0", "2", "entails", "Neutral", "", "contradicton"):
        data = xnli_tsv(("de", "neutral", "a", "b"), ("de", label, "a", "b"))
        with pytest.raises(UserError) as caught:
            builder_rows(tmp_path, "xnli.dev.tsv", data, "de")
        assert str(caught.value).startswith(f"xnli.dev.tsv:3: label {label!r} is not one of entailment, neutral, contr")
    number = multinli_jsonl(("neutral", "a", "b")).replace(b'"gold_label": "neutral"', b'"gold_label": 1')
    assert error_message(number, member="a.jsonl") == ":1: column 'gold_label' is a number, expected text"


def test_empty_sentences_and_duplicate_ids_are_errors(tmp_path):
    for first, second in [("a", ""), (" \u3000", "b")]:
        with pytest.raises(UserError, match="xnli.test.tsv:3: a text is empty"):
            rows = [("sw", "neutral", "a", "b"), ("sw", "neutral", first, second)]
            builder_rows(tmp_path, "xnli.test.tsv", xnli_tsv(*rows), "sw")
    data = multinli_jsonl(("neutral", "a", " "), ("-", "b", "c"), ("entailment", "d", "e"))
    parsed = builder_rows(tmp_path, "multinli_1.0_train.jsonl", data, empty_text="skip")
    assert [row.where.rpartition(":")[2] for row in parsed if isinstance(row, Skipped)] == ["1", "2"]
    assert pairs_of(parsed) == [("2", "entailment", "d", "e")]
    duplicate = xnli_tsv(("en", "neutral", "a", "b"), ("fr", "neutral", "a", "b")).replace(b"fr\t", b"en\t")
    with pytest.raises(UserError, match="xnli.dev.tsv:3: id '1' occurs twice in dev of en"):
        builder_rows(tmp_path, "xnli.dev.tsv", duplicate)


def test_undecided_pairs_are_skipped_with_the_same_reason():
    rows = [("en", "-", "a", "b"), ("fr", "-", "c", "d"), ("en", "neutral", "e", "f"), ("en", "-", "g", "h")]
    first, row, last = parse(xnli_tsv(*rows), "en")
    assert first == Skipped("a.tsv:2", "label '-', because the annotators disagree")
    assert last == Skipped("a.tsv:5", first.reason)
    assert row == CorpusRow("2", "e", "f", "neutral", "a.tsv:4")


def test_rows_are_selected_by_language_and_ids_repeat_across_languages():
    rows = [(language, "neutral", f"{language} {i}", "x") for language in xnli.LANGUAGES for i in range(3)]
    for language in xnli.LANGUAGES:
        assert [row[::2] for row in pairs_of(parse(xnli_tsv(*rows), language))] == [
            (str(i + 1), f"{language} {i}") for i in range(3)
        ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (xnli_tsv(("eng", "neutral", "a", "b")), ":2: language 'eng' is not one of ar, bg, de, el, en, es,"),
        (xnli_tsv(("en", "neutral", "a\tb", "c")), ":2: 21 columns, expected 19"),
        (xnli_tsv(("en", "neutral", "a", "b"))[:-6], ":2: 18 columns, expected 19"),
        (xnli_tsv(("en", "neutral", "caf\xe9", "b")).decode().encode("latin-1"), ":2: byte 0xe9 is not UTF-8"),
        (xnli_tsv(("en", "neutral", "a", "b")).replace(b"sentence2\t", b"hypothesis\t"), ":2: no column 'sentence2'"),
        (b"<html>\n<body>404</body>\n", ":2: no column 'language' among '<html>'"),
    ],
)
def test_malformed_xnli_is_refused(data, message):
    assert error_message(data, "en").startswith(message)


@pytest.mark.parametrize(
    ("data", "member", "message"),
    [
        (multinli_jsonl(("neutral", "a", "b"))[:-40], "a.jsonl", ":1: malformed JSON: Expecting value"),
        (multinli_jsonl(("neutral", "a", "b")) + b"\n", "a.jsonl", ":2: malformed JSON: Expecting value"),
        (multinli_jsonl(("neutral", "a", "b")).replace(b"pairID", b"genre"), "a.jsonl", ":1: malformed JSON: the key"),
        (multinli_jsonl(("neutral", "@", "b")).replace(b"@", b"\\ud800"), "a.jsonl", ":1: column 'sentence1' has half"),
        (jsonl({"gold_label": "neutral", "sentence1": "a"}), "a.jsonl", ":1: no column 'sentence2'"),
        (multinli_txt(("neutral", "a", "b"))[:-20], "a.txt", ":2: 10 columns, expected 15"),
        (multinli_txt(("neutral", "a", "b"), votes="\t" * 5), "a.txt", ":2: 16 columns, expected 15"),
    ],
)
def test_malformed_multinli_is_refused(data, member, message):
    assert error_message(data, member=member).startswith(message)


def test_multinli_ids_count_skipped_rows_too():
    rows = [("neutral", "a", "b"), ("-", "b", "c"), ("entailment", "d", "e")]
    assert parse(multinli_jsonl(*rows), member="a.jsonl") == [
        CorpusRow("0", "a", "b", "neutral", "a.jsonl:1"),
        Skipped("a.jsonl:2", "label '-', because the annotators disagree"),
        CorpusRow("2", "d", "e", "entailment", "a.jsonl:3"),
    ]


MULTINLI_ROWS = [("neutral", "train a", "b"), ("-", "c", "d"), ("contradiction", "train e", "f")]


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    """Write a zip as macOS does, with an AppleDouble file beside each member."""
    extra = ["__MACOSX/{0}/._{2}".format(*name.rpartition("/")) for name in members]
    return archive_writers.write_zip(path, members | dict.fromkeys(extra, b"\x00\x05\x16\x07"))


def xnli_members(split: str, *, extension: str = "") -> dict[str, bytes]:
    rows = [(language, "neutral", f"{split} {language}", "x") for language in xnli.LANGUAGES]
    both_formats = {
        f"XNLI-1.0/xnli.{split}.jsonl": xnli_jsonl(*rows),
        f"XNLI-1.0/xnli.{split}.tsv": xnli_tsv(*rows),
    }
    return {name: data for name, data in both_formats.items() if name.endswith(extension)}


def multinli_members(extension: str = "") -> dict[str, bytes]:
    both_formats = {
        "multinli_1.0/multinli_1.0_train.txt": multinli_txt(*MULTINLI_ROWS),
        "multinli_1.0/multinli_1.0_dev_matched.txt": multinli_txt(("neutral", "never", "read")),
        "multinli_1.0/multinli_1.0_dev_matched.jsonl": multinli_jsonl(("neutral", "never", "read")),
        "multinli_1.0/multinli_1.0_train.jsonl": multinli_jsonl(*MULTINLI_ROWS),
    }
    return {name: data for name, data in both_formats.items() if name.endswith(extension)}


def check_corpus(sources: Sources) -> None:
    (corpus,) = xnli.CORPORA
    for language in corpus.languages:
        for split in ("dev", "test"):
            (row,) = corpus.rows(sources, language, split)
            assert isinstance(row, CorpusRow)
            assert (row.id, row.label, row.text, row.text_pair) == ("1", "neutral", f"{split} {language}", "x")
    assert pairs_of(list(corpus.rows(sources, "en", "train"))) == [
        ("0", "neutral", "train a", "b"),
        ("2", "contradiction", "train e", "f"),
    ]


@pytest.mark.parametrize(("xnli_extension", "multinli_extension"), [("", ""), ("jsonl", "jsonl"), ("tsv", "txt")])
def test_archives_with_one_or_both_formats_are_read(tmp_path, xnli_extension, multinli_extension):
    members = xnli_members("dev", extension=xnli_extension) | xnli_members("test", extension=xnli_extension)
    first = write_zip(tmp_path / "first.zip", {"XNLI-1.0/README.md": b"x", **members})
    second = write_zip(tmp_path / "second.zip", multinli_members(multinli_extension))
    check_corpus(Sources({"XNLI-1.0.zip": first, "multinli_1.0.zip": second}))


@pytest.mark.parametrize("with_top_folder", [True, False])
def test_unpacked_folders_are_read(tmp_path, with_top_folder):
    members = xnli_members("dev") | xnli_members("test") | multinli_members()
    if not with_top_folder:
        members = {name.rpartition("/")[2]: data for name, data in members.items()}
    archive_writers.write_folder(tmp_path, members)
    check_corpus(Sources({"XNLI-1.0.zip": tmp_path, "multinli_1.0.zip": tmp_path}))


def test_missing_and_duplicate_members_are_named(tmp_path):
    members = xnli_members("dev")
    archive = write_zip(tmp_path / "XNLI-1.0.zip", members | {f"copy/{name}": data for name, data in members.items()})
    sources = Sources({"XNLI-1.0.zip": archive})
    with pytest.raises(UserError, match="XNLI-1.0.zip: it has no xnli.test.tsv or xnli.test.jsonl"):
        list(xnli.CORPORA[0].rows(sources, "en", "test"))
    with pytest.raises(UserError, match="it has XNLI-1.0/xnli.dev.tsv and copy/XNLI-1.0/xnli.dev.tsv; leave only one"):
        list(xnli.CORPORA[0].rows(sources, "en", "dev"))
    with pytest.raises(UserError, match="multinli_1.0.zip is missing"):
        list(xnli.CORPORA[0].rows(sources, "en", "train"))


def test_the_corpus_declares_its_languages_splits_and_downloads():
    (corpus,) = xnli.CORPORA
    assert " ".join(corpus.languages) == "ar bg de el en es fr hi ru sw th tr ur vi zh"
    splits = {language: corpus.splits(language) for language in corpus.languages}
    assert splits.pop("en") == ("train", "dev", "test") and set(splits.values()) == {("dev", "test")}
    assert [download.filename for download in corpus.downloads("en")] == ["multinli_1.0.zip", "XNLI-1.0.zip"]
    assert [download.filename for download in corpus.downloads("sw")] == ["XNLI-1.0.zip"]


def test_the_task_loads_from_the_archives(tmp_path):
    members = xnli_members("dev") | xnli_members("test")
    members["XNLI-1.0/xnli.test.tsv"] = xnli_tsv(
        ("en", "neutral", "test en", "x"), ("th", "contradiction", "a", '"b'), ("th", "-", "c", "d")
    )
    write_zip(tmp_path / "XNLI-1.0.zip", members)
    write_zip(tmp_path / "multinli_1.0.zip", multinli_members())
    config = TaskConfig(
        name="xnli", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), target_languages=("th", "ar")
    )
    task = loader.task(xnli.CORPORA[0], config)
    assert [(row.id, row.label, row.text_pair) for row in task.load("train", "en")] == [
        ("xnli/train/en/0", 1, "b"),
        ("xnli/train/en/2", 2, "f"),
    ]
    assert [(row.id, row.text, row.label) for row in task.load("dev", "en")] == [("xnli/dev/en/1", "dev en", 1)]
    assert [(row.id, row.text_pair, row.label) for row in task.load("test", "th")] == [("xnli/test/th/1", '"b', 2)]
    with pytest.raises(UserError, match="no rows of test in ar"):
        task.load("test", "ar")
