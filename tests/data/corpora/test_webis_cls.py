"""Webis-CLS-10 reviews are read from files in the exact format of the release, and malformed ones are skipped."""

import gzip
import io
import itertools
import tarfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import archive_writers
from xtransfer.config import TaskConfig
from xtransfer.data import blank
from xtransfer.data.corpora import loader, webis_cls
from xtransfer.data.corpora.corpus import CorpusRow, Skipped, Sources
from xtransfer.errors import UserError

HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<items>'
TAIL = "\n\n</items>"
RATINGS = ("1.0", "5.0", "4.0", "2.0")


def english(rating: str, text: str) -> str:
    """Return an English item: it has few children, each on its own line, and a newline before each end tag."""
    return (
        f"<item>\n\t<summary>In short\n</summary>\n\t<rating>{rating}</rating>\n\t<text>{text}\n</text>\n"
        "\t<category>books</category>\n\t</item>"
    )


def german(rating: str, text: str) -> str:
    return (
        f"<item><category>Bücher</category><rating>{rating}</rating><realname>True</realname><asin>3000000001</asin>"
        "<url>http://www.example.de/r/3000000001/ref=cm_2?ie=UTF8&amp;pageNumber=2</url>"
        f"<text>{text}</text><title>Ein Titel</title><summary>Kurz</summary><date>1. Mai 2009</date><location />"
        '<helpfulness_votes><value>3</value><value>9</value></helpfulness_votes><reviewer>A. "B"</reviewer></item>'
    )


def french(rating: str, text: str) -> str:
    return (
        f"<item><category>DVD</category><rating>{rating}</rating><asin>B000000001</asin>"
        f"<url>http://www.example.fr/r/B000000001/</url><text>{text}</text><title>Un titre</title>"
        "<summary>Bref</summary><date>3 août 2009</date><location>Nice, France</location>"
        "<helpfulness_votes><value>8</value><value>9</value></helpfulness_votes><reviewer>C</reviewer>"
        "<badges><value>TOP 50 REVIEWER</value><value>REAL NAME</value></badges></item>"
    )


def japanese(rating: str, text: str) -> str:
    return (
        f"<item><category>ミュージック</category><rating>{rating}</rating><asin>B000000002</asin>"
        f"<url>http://www.example.co.jp/r/B000000002/</url><text>{text}</text><title>題</title><summary>要約</summary>"
        "<date>2009/6/24</date><location /><helpfulness_votes><value>4</value><value>1</value></helpfulness_votes>"
        "<reviewer>名</reviewer><badges /></item>"
    )


def document(*items: str) -> bytes:
    return (HEAD + "\n\n".join(items) + TAIL).encode()


def parse(data: bytes, *, labelled: bool = True, chunk: int = 1 << 20) -> list[CorpusRow | Skipped]:
    return list(webis_cls.parse(io.BytesIO(data), "a.review", labelled=labelled, chunk=chunk))


def rows_of(parsed: list[CorpusRow | Skipped]) -> list[tuple[str, str, str | None]]:
    return [(row.id, row.text, row.label) for row in parsed if isinstance(row, CorpusRow)]


def skip_reason(item: str, *, labelled: bool = True) -> str:
    """Return why an item between two valid ones is skipped, and check that the valid ones are read."""
    parsed = parse(document(german("5.0", "davor"), item, german("1.0", "danach")), labelled=labelled)
    assert [row[1] for row in rows_of(parsed)] == ["davor", "danach"]
    skipped = [row for row in parsed if isinstance(row, Skipped)]
    assert len(skipped) == 1 and skipped[0].where == "a.review:4"
    return skipped[0].reason.removeprefix("malformed item: ")


@pytest.mark.parametrize("item", [english, german, french, japanese])
def test_the_children_of_each_language_are_read(item):
    parsed = parse(document(item("4.0", "très &amp; schön &lt;3, R&amp;amp;B"), item("2.0", "悪い\n wirklich")))
    assert rows_of(parsed) == [("0", "très & schön <3, R&amp;B", "positive"), ("1", "悪い\n wirklich", "negative")]
    assert {(row.text_pair, row.where) for row in parsed} >= {(None, "a.review:2")}


@pytest.mark.parametrize(
    ("rating", "label"),
    [("5.0", "positive"), ("4.0", "positive"), ("2.0", "negative"), ("1.0", "negative"), ("4", "positive")],
)
def test_ratings_become_labels(rating, label):
    assert rows_of(parse(document(english(rating, "x")))) == [("0", "x", label)]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (german("3.0", "x"), "<rating> is 3, neither negative nor positive"),
        (german("6.0", "x"), "<rating> is not a number from 1 to 5"),
        (german("5.5", "x"), "<rating> is not a number from 1 to 5"),
        (german("nan", "x"), "<rating> is not a number from 1 to 5"),
        (german("５.0", "x"), "<rating> is not a number from 1 to 5"),
        (german("", "x"), "empty <rating>"),
        (german("5.0", " \n\u3000"), "empty <text>"),
        (german("5.0", "\u200b\ufeff"), "empty <text>"),
        ("<item><rating>5.0</rating><text /></item>", "empty <text>"),
        ("<item><rating>5.0</rating></item>", "no <text>"),
        ("<item><text>x</text></item>", "no <rating>"),
        ("<item><rating>5.0</rating><text>x</text><text>y</text></item>", "more than one <text>"),
        (german("5.0", "a <b>bold</b> word"), "tags in <text>"),
        (german("5.0", "R & B"), "not well-formed (invalid token)"),
        (german("5.0", "1 < 2"), "not well-formed (invalid token)"),
        (german("5.0", "a\x08b"), "not well-formed (invalid token)"),
        (german("5.0", "a&#8;b"), "reference to invalid character number"),
        (german("5.0", "a&#xd800;b"), "reference to invalid character number"),
        (german("5.0", "caf&eacute;"), "undefined entity"),
        (german("5.0", "x").replace("</text>", "</txt>"), "mismatched tag"),
        (german("5.0", "x").removesuffix("</item>"), "no element found"),
        (german("5.0", "x").removeprefix("<item>"), "text outside of <item>"),
        ("stray text", "text outside of <item>"),
        ("<item/>", "no <text>"),
        ("<!-- no item -->", "text outside of <item>"),
        ("<item>" + "<a/>" * 2000 + "</item>", "too many tags"),
    ],
)
def test_only_the_malformed_item_is_skipped(item, expected):
    assert skip_reason(item) == expected


def test_invalid_utf8_skips_only_its_item():
    data = document(german("5.0", "davor"), german("5.0", "@"), german("1.0", "danach")).replace(b"@", b"caf\xe9")
    parsed = parse(data)
    assert rows_of(parsed) == [("0", "davor", "positive"), ("2", "danach", "negative")]
    assert parsed[1] == Skipped("a.review:4", "malformed item: not well-formed (invalid token)")


def test_unlabelled_reviews_need_no_rating():
    items = [german("5.0", "a"), french("3.0", "b"), "<item><text>c</text></item>"]
    assert rows_of(parse(document(*items), labelled=False)) == [("0", "a", None), ("1", "b", None), ("2", "c", None)]
    assert skip_reason("<item><rating>5.0</rating></item>", labelled=False) == "no <text>"


def test_each_row_has_the_line_on_which_its_item_starts():
    parsed = parse(document(english("5.0", "a\n b"), german("5.0", "c"), "<item></item>", french("1.0", "d")))
    assert [row.where for row in parsed] == ["a.review:2", "a.review:12", "a.review:14", "a.review:16"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.review: it has no <item>; expected <items> of reviews"),
        (b"<html>403 Forbidden</html>", "a.review: it has no <item>; expected <items> of reviews"),
        (document(german("5.0", "x")).decode().encode("utf-16"), "a.review: it has no <item>"),
        (document(german("5.0", "x"))[:-9], "a.review:2: truncated: </items> is missing; download the file again"),
        (document(german("5.0", "x"))[:300], "a.review:2: truncated: </items> is missing"),
        (document(german("5.0", "x")).replace(b"<items>", b"<reviews>"), "a.review: expected <items> before the first"),
        (document(german("5.0", "x")) * 2, "a.review:4: there is text after </items>"),
        (
            document(german("5.0", "x")).replace(b'"utf-8"', b"'ISO-8859-1'"),
            "a.review: its encoding is 'ISO-8859-1', expected 'utf-8'",
        ),
    ],
)
def test_other_and_truncated_files_are_refused(data, message):
    with pytest.raises(UserError) as caught:
        parse(data)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE items [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>',
        '<!DOCTYPE items [<!ENTITY file SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE items SYSTEM "http://www.example.com/items.dtd">',
        '<!DOCTYPE items [<!ENTITY a "<item><text>b</text></item>">]>',
    ],
)
def test_a_document_type_declaration_is_refused(declaration):
    data = document(german("5.0", "&a;&b;&file;")).replace(b"<items>", declaration.encode() + b"<items>")
    with pytest.raises(UserError, match="a document type declaration is not allowed"):
        parse(data)
    inside_items = parse(document(german("5.0", "davor"), declaration + "<x>&a;&b;</x>", german("1.0", "danach")))
    assert [row[1] for row in rows_of(inside_items)] == ["davor", "danach"] and len(inside_items) > 2


def test_a_file_with_too_many_malformed_items_is_refused():
    malformed, valid = "<item></item>", german("5.0", "x")
    assert len(parse(document(*[malformed] * 20, valid))) == 21
    assert len(parse(document(*[malformed] * 21, *[valid] * 400))) == 421
    with pytest.raises(UserError, match="a.review: 21 of 22 items are malformed; download the file again"):
        parse(document(*[malformed] * 21, valid))
    with pytest.raises(UserError, match="a.review: 22 of 421 items"):
        parse(document(*[malformed] * 22, *[valid] * 399))


def test_a_byte_order_mark_and_a_missing_declaration_are_accepted():
    data = document(german("5.0", "x"))
    expected = rows_of(parse(data))
    assert rows_of(parse(b"\xef\xbb\xbf" + data)) == expected
    assert rows_of(parse(data[data.index(b"<items>") :])) == expected


xml_text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff") | st.sampled_from("\t\n&<>]\"'"),
    min_size=1,
    max_size=12,
).filter(lambda text: not blank.is_empty(text))
malformed_items = st.sampled_from(
    ["<item></item>", "<item>", german("3.0", "x"), german("5.0", "a & b"), "</item>", "junk"]
)


@given(
    st.lists(st.tuples(xml_text, st.sampled_from("1245")) | malformed_items, max_size=12),
    st.integers(1, 200),
    st.randoms(use_true_random=False),
    st.sampled_from(["", "\n", "\n\n", "\n\n\n"]),
)
def test_round_trip_between_malformed_items_for_any_chunk_size(items, chunk, shuffler, separator):
    written, expected = [german("5.0", "first")], [("first", "positive")]
    for item in items:
        if isinstance(item, str):
            written.append(item)
            continue
        text, rating = item
        tags = [f"<text>{escape(text)}</text>", f"<rating>{rating}.0</rating>", "<v><text>no</text></v>", "<l />"]
        shuffler.shuffle(tags)
        written.append(f"<item>{''.join(tags)}</item>")
        expected.append((text.strip(), "positive" if rating in "45" else "negative"))
    data = (HEAD + separator.join(written) + TAIL).encode()
    parsed = parse(data, chunk=chunk)
    assert [row[1:] for row in rows_of(parsed)] == expected
    assert parsed == parse(data)


@given(st.binary(max_size=60) | xml_text.map(str.encode), st.integers(1, 9), st.booleans())
def test_any_bytes_are_read_or_refused_with_one_line(content, chunk, complete):
    try:
        parsed = parse(HEAD.encode() + b"<item>" + content + (b"</item></items>" if complete else b""), chunk=chunk)
    except UserError as error:
        assert str(error).startswith("a.review") and "\n" not in str(error)
    else:
        assert parsed


class GeneratedFile(io.RawIOBase):
    """A file whose content is generated while it is read."""

    def __init__(self, pieces):
        self.pieces = pieces

    def read(self, size=-1):
        return next(self.pieces, b"")


def test_memory_does_not_grow_with_the_file():
    tracemalloc = pytest.importorskip("tracemalloc")
    item = german("5.0", "wort " * 400).encode()
    block = item * 500
    pieces = itertools.chain([HEAD.encode()], itertools.repeat(block, 20), [TAIL.encode()])
    tracemalloc.start()
    try:
        count = sum(1 for _ in webis_cls.parse(GeneratedFile(pieces), "a.review", labelled=False))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000 and peak < 20 * len(block) / 4


def test_an_endless_item_is_refused_before_it_fills_the_memory():
    pieces = itertools.chain([HEAD.encode() + b"<item><text>"], itertools.repeat(b"x" * (1 << 20), 48))
    with pytest.raises(UserError, match="a.review:2: an item of more than 32 MiB"):
        list(webis_cls.parse(GeneratedFile(pieces), "a.review", labelled=False))


@pytest.fixture
def archive(tmp_path) -> Path:
    """Write an archive like cls-acl10-unprocessed.tar.gz, including translations named like the English files."""
    makers = {"de": german, "fr": french, "jp": japanese, "en": english}
    members = {}
    for folder, domain, file in itertools.product(makers, webis_cls.DOMAINS, ("test", "train", "unlabeled")):
        names = {f"{folder}/{domain}/{file}.review": f"{folder} {domain} {file}"}
        if folder != "en" and file == "test":
            names[f"{folder}/{domain}/trans/en/{domain}/test.review"] = "translated"
        for name, text in names.items():
            items = (makers[folder](rating, f"{text} {rating}") for rating in RATINGS)
            members[f"cls-acl10-unprocessed/{name}"] = document(*items)
    return archive_writers.write_tar_gz(tmp_path / webis_cls.DOWNLOAD.filename, members)


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("layout", ["archive", "folder", "parent"])
def test_every_language_domain_and_split_has_its_rows(archive, tmp_path, layout):
    source = archive
    if layout != "archive":
        source = unpacked(archive, tmp_path / "parent")
        source = source / "cls-acl10-unprocessed" if layout == "folder" else source
    sources = Sources({webis_cls.DOWNLOAD.filename: source})
    for corpus in webis_cls.CORPORA:
        domain = corpus.name.removeprefix("webis_cls/")
        assert corpus.labels == ("negative", "positive") and corpus.source_language == "en"
        for language, folder in [("en", "en"), ("de", "de"), ("fr", "fr"), ("ja", "jp")]:
            assert corpus.splits(language) == ("train", "test", "unlabelled")
            for split in corpus.splits(language):
                name = "unlabeled" if split == "unlabelled" else split
                labels = [None] * 4 if split == "unlabelled" else ["negative", "positive", "positive", "negative"]
                assert rows_of(list(corpus.rows(sources, language, split))) == [
                    (str(i), f"{folder} {domain} {name} {rating}", labels[i]) for i, rating in enumerate(RATINGS)
                ]
    assert {corpus.name for corpus in webis_cls.CORPORA} == {"webis_cls/books", "webis_cls/dvd", "webis_cls/music"}
    assert corpus.languages == ("en", "de", "fr", "ja")


def test_the_error_for_a_missing_file_names_it(archive, tmp_path):
    folder = unpacked(archive, tmp_path / "parent")
    (folder / "cls-acl10-unprocessed/en/dvd/test.review").unlink()
    sources = Sources({webis_cls.DOWNLOAD.filename: folder})
    with pytest.raises(UserError, match="it has no en/dvd/test.review;"):
        list(webis_cls.CORPORA[1].rows(sources, "en", "test"))


def test_the_task_loads_from_the_archive_and_holds_dev_out_of_train(archive, tmp_path):
    paths = {"data_dir": str(archive), "cache_dir": str(tmp_path / "cache")}
    config = TaskConfig(name="webis_cls/music", target_languages=("ja",), held_out_dev=2, **paths)
    task = loader.task(webis_cls.CORPORA[2], config)
    test_rows = [(row.id, row.text, row.label) for row in task.load("test", "ja")]
    ids = [f"webis_cls/music/test/ja/{number}" for number in range(4)]
    assert test_rows == list(zip(ids, [f"jp music test {rating}" for rating in RATINGS], [0, 1, 1, 0], strict=True))
    unlabelled = task.load("unlabelled", "en")
    assert [(row.text, row.label) for row in unlabelled] == [(f"en music unlabeled {rating}", -1) for rating in RATINGS]
    train, dev = task.load("train", "en"), task.load("dev", "en")
    assert {row.label for row in dev} == {0, 1} == {row.label for row in train}
    assert sorted(row.text for row in train + dev) == sorted(f"en music train {rating}" for rating in RATINGS)


def test_rows_of_an_archive_with_a_flipped_byte_are_refused(archive):
    packed = gzip.compress(gzip.decompress(archive.read_bytes()), compresslevel=0)
    archive.write_bytes(packed.replace(b"jp dvd train 5.0", b"jp dvd train 5.1"))
    assert archive.read_bytes() != packed
    with pytest.raises(UserError, match=f"{archive}: .*truncated or corrupt .*CRC.*: download it again"):
        list(webis_cls.CORPORA[1].rows(Sources({webis_cls.DOWNLOAD.filename: archive}), "ja", "train"))
