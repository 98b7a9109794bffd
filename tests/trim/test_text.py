"""Reading the texts to keep, and comparing two tokenizers on them."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tokenizers_of_each_kind import wordpiece
from xtransfer.errors import UserError
from xtransfer.trim import text
from xtransfer.trim.text import Agreement, Line


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": "Guten Tag\n\n  \nna ja\r\n",
        "a.tsv": "id\ttext\n7\tGuten Tag\n8\t \n9\tna ja\n",
        "a.csv": 'text\n"Guten Tag"\n""\nna ja\n',
        "a.jsonl": '{"text": "Guten Tag"}\n{"text": ""}\n{"text": "na ja"}\n',
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert [line.text for line in text.read([tmp_path / name], "text")] == ["Guten Tag", "na ja"], name
    both = list(text.read([tmp_path / "a.txt", tmp_path / "a.tsv"], "text"))
    assert [line.place for line in both] == [f"{tmp_path}/{p}" for p in ("a.txt:1", "a.txt:4", "a.tsv:2", "a.tsv:4")]


def test_second_texts_of_pairs_count_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("says,text_pair\neins,zwei\n", encoding="utf-8")
    assert [line.text for line in text.read([tmp_path / "a.csv"], "says")] == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt: no such file"),
        ("a.txt", b" \n\n", "a.txt: no rows with text"),
        ("a.txt", "\u200b\n\ufeff\n\0\n".encode(), "a.txt: no rows with text"),
        ("a.txt", b"ok\n\xff\n", "a.txt:2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a.pdf", b"", "a.pdf: the ending '.pdf' is not one of .txt, .tsv, .csv, .jsonl, .parquet"),
        ("a.tsv", b"texts\nx\n", "a.tsv:2: no column 'text' among 'texts'; did you mean 'texts'?"),
        ("a.tsv", b"text\n\n", "a.tsv: no rows with text"),
    ],
)
def test_errors_name_the_file_and_line(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(text.read([path], "text"))
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_texts_are_read_up_to_the_limit_of_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHARACTER_LIMIT", 6)
    (tmp_path / "a.txt").write_text("a bad b\n  good  \nbad bad\nbadbad\n", encoding="utf-8")
    texts = list(text.read([tmp_path / "a.txt"], "text"))
    assert [(line.text, line.clipped) for line in texts] == [
        ("a bad ", True),
        ("good", False),
        ("bad ba", True),
        ("badbad", False),
    ]
    tokenizer = wordpiece(["bad"])
    assert text.compare(tokenizer, tokenizer, range(6), texts).clipped == 2


def test_failure_of_the_tokenizer_names_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wordpiece(["bad"])
    lines = [Line("x:1", "bad"), Line("x:2", "a \ud800")]
    with pytest.raises(UserError, match=r"^x:2: the tokenizer fails on 'a \\ud800'"):
        text.compare(tokenizer, tokenizer, range(6), lines)


def test_counts_by_hand() -> None:
    tokenizer = wordpiece(["ab", "##c", "a", "d"])
    usage = text.count(tokenizer, {"type": "Unigram"}, [Line("x:1", "abc a"), Line("x:2", "a q")])
    #                                  pad unk cls sep mask ab ##c a  d
    np.testing.assert_array_equal(usage.counts, [0, 1, 2, 2, 0, 1, 1, 2, 0])
    assert usage.characters == set("abcq") and usage.prefixes == set()


def test_pieces_of_unknown_words_by_hand() -> None:
    tokenizer = wordpiece(["ab", "##c", "a", "d"])
    lines = [Line("x:1", "abc a"), Line("x:2", "abcd dd")]
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    usage = text.count(tokenizer, model | {"vocab": tokenizer.get_vocab()}, lines)
    assert usage.prefixes == {"ab", "##c", "d"}


def test_agreement_by_hand() -> None:
    """The second tokenizer lacks "good", whose letters g and o are pieces, but d is not."""
    before = wordpiece(["good", "go", "##o", "bad"])
    after = wordpiece(["go", "##o", "bad"])
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    texts = [Line("x:1", "bad goo"), Line("x:2", "good bad bad"), Line("x:3", "hm bad"), Line("x:4", "good")]
    assert text.compare(before, after, kept, texts) == Agreement(
        texts=4, same=2, tokens=(9, 9), unknown=(1, 3), first="x:2"
    )
