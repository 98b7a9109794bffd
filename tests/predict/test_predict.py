"""The predict command labels every text as if it were alone and keeps the order, and its errors name the input line."""

import functools
import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tests.helpers import predicting, tiny
from tests.helpers.predicting import error_of, run, write
from xtransfer.data.formats import tables
from xtransfer.data.tokens import chunks
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.predict import __main__ as predict_main
from xtransfer.predict import predictor

LENGTH = 32  # the positions of the model
WORDS = sorted({word for table in (tiny.GOOD, tiny.BAD, tiny.FILLER) for group in table.values() for word in group})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predicting.classifier(tmp_path_factory.mktemp("model"))


def texts(n: int, longest: int = 12, seed: int = 0) -> list[str]:
    """Return n random texts of up to `longest` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


@functools.cache
def forward(model: Path) -> tuple[Any, Any]:
    """Return the tokenizer, and the compiled function from a batch to logits."""
    graphdef, params = hf_checkpoint.load_classifier(model, len(hf_config.read_labels(model) or ()), seed=0)
    return load_tokenizer(model), jax.jit(lambda batch: nnx.merge(graphdef, params)(batch))


def probabilities(model: Path, text: str, pair: str | None = None) -> np.ndarray:
    """Return the probabilities [K] of one text that is alone in its batch."""
    tokenizer, logits = forward(model)
    tokens = tokenizer(text, pair, truncation=True, max_length=LENGTH, return_token_type_ids=True)
    ids = np.zeros((3, 1, LENGTH), np.int32)
    for row, key in zip(ids, ("input_ids", "token_type_ids", "attention_mask"), strict=True):
        row[0, : len(tokens[key])] = tokens[key]
    batch = {
        "input_ids": ids[0],
        "token_type_ids": ids[1],
        "segment_ids": ids[2],
        "position_ids": np.arange(LENGTH, dtype=np.int32)[None] + hf_config.read_config(model).position_offset,
        "cls_index": np.zeros((1, 1), np.int32),
    }
    scores = np.asarray(logits(batch), np.float64)[0, 0]
    return np.exp(scores) / np.exp(scores).sum()


def check(model: Path, row: dict[str, Any], text: str, pair: str | None = None) -> None:
    """Check an output row against the text alone in its batch."""
    expected, labels = probabilities(model, text, pair), hf_config.read_labels(model) or ()
    assert list(row) == ["id", "label", "probabilities"] and tuple(row["probabilities"]) == labels
    np.testing.assert_allclose(list(row["probabilities"].values()), expected, atol=1e-5)
    assert row["label"] == labels[int(expected.argmax())]
    assert math.isclose(sum(row["probabilities"].values()), 1, abs_tol=1e-5)


def test_rows_are_in_order_and_as_if_alone(model: Path, tmp_path: Path) -> None:
    inputs = texts(300)
    source = write(tmp_path / "a.tsv", "id\ttext\n" + "".join(f"n{i}\t{t}\n" for i, t in enumerate(inputs)))
    rows = run(model, source, "--batch-size", "3")
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(300)]
    assert len({row["label"] for row in rows}) > 1
    for i in (0, 1, 17, 150, 298, 299):
        check(model, rows[i], inputs[i])


def test_roberta_positions_and_padding(tmp_path: Path) -> None:
    classifier, inputs = tiny.roberta(tmp_path / "roberta"), texts(60)
    source = write(tmp_path / "in" / "a.tsv", "text\n" + "\n".join(inputs) + "\n")
    for text, row in list(zip(inputs, run(classifier, source), strict=True))[::7]:
        check(classifier, row, text)


def test_small_windows_give_the_same_output(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts(50)))
    one_window = run(model, source)
    monkeypatch.setattr(predictor, "_WINDOW_ROWS", 7)
    by_rows = run(model, source)
    monkeypatch.setattr(predictor, "_WINDOW_CHARACTERS", 100)
    by_characters = run(model, source)
    for rows in (by_rows, by_characters):
        assert [row["id"] for row in rows] == list(range(50))
        for expected, row in zip(one_window, rows, strict=True):
            np.testing.assert_allclose(
                list(expected["probabilities"].values()), list(row["probabilities"].values()), atol=1e-5
            )


def test_pairs_and_ids_are_used_by_default_and_keep_their_type(model: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "007", "text": "the film", "text_pair": "is good"},
        {"id": 7, "text": "der Film", "text_pair": "ist schlecht"},
        {"id": 0.5, "text": "der Film", "text_pair": "ist schlecht sehr"},
    ]
    source = write(tmp_path / "a.jsonl", "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    outputs = run(model, source)
    assert [output["id"] for output in outputs] == ["007", 7, 0.5]
    for output, row in zip(outputs, rows, strict=True):
        check(model, output, row["text"], row["text_pair"])  # type: ignore[arg-type]
    text_only = run(model, source, "--pair-column", "", "--id-column", "")
    assert [output["id"] for output in text_only] == [0, 1, 2]
    check(model, text_only[1], "der Film")


def test_columns_may_have_other_names(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", 'key,first,second\r\n1,"the ""film""",is good\r\n')
    rows = run(model, source, "--text-column", "first", "--pair-column", "second", "--id-column", "key")
    assert rows[0]["id"] == "1"
    check(model, rows[0], 'the "film"', "is good")


def test_long_texts_are_truncated_and_huge_ones_are_clipped_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(texts(1, seed=3)[0].split() * 40)
    huge = "good " * 4_000_000
    source = write(tmp_path / "a.tsv", f"text\n{long}\n{huge}\nthe film\n")
    tracemalloc.start()  # only while reading, because it slows down tracing and compiling several times
    rows = list(tables.read_texts(tables.inspect(source, "text", None, None, skip_empty=False)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 3 and peak < 5 * len(huge), f"{peak / len(huge):.1f} times the text"
    outputs = run(model, source)
    check(model, outputs[0], long)
    check(model, outputs[1], huge[:1000])
    check(model, outputs[2], "the film")
    log = capsys.readouterr().out
    assert (
        "3 rows" in log and "\nwarning: 2 of 3 texts are longer than 32 tokens and were truncated; --long mean" in log
    )
    check(model, run(model, source, "--max-length", "4")[2], "the film")
    assert run(model, source, "--max-length", "4")[0] != outputs[0]


def test_empty_text_is_an_error_or_is_skipped_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\n \nder Film\n\n")
    message = "a.tsv:3: column 'text' is empty; fill it in, or pass --empty-text skip"
    assert error_of(model, source) == message
    assert [row["id"] for row in run(model, source, "--empty-text", "skip")] == [0, 2]
    assert "skipped rows without text: 2" in capsys.readouterr().out


@pytest.mark.parametrize("empty", [None, "", "\u200b\ufeff", " \n\u2060", "\u200e" * 4000])
def test_null_and_invisible_text_is_empty(model: Path, tmp_path: Path, empty: str | None) -> None:
    rows = [{"text": "the film"}, {"text": empty}, {"text": "der Film"}]
    source = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert error_of(model, source).startswith("a.jsonl:2: column 'text' is empty; fill it in, or pass --empty-text")
    assert [row["id"] for row in run(model, source, "--empty-text", "skip")] == [0, 2]


@pytest.mark.parametrize("long", predictor.LONG)
@pytest.mark.parametrize("blank", [" ", "\u3000", "\u200b", "\ufeff"])
def test_blanks_before_and_after_a_text_change_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], blank: str, long: str
) -> None:
    source = write(tmp_path / "a.tsv", f"text\n{blank * 4000}good film{blank * 4000}\n")
    check(model, run(model, source, "--long", long)[0], "good film")
    assert "longer than" not in capsys.readouterr().out


def test_short_texts_have_the_same_output_with_mean_and_no_notes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.tsv", "text\n" + "\n".join(texts(200)) + "\n")
    assert run(model, source, "--long", "mean") == run(model, source)
    assert "longer than" not in capsys.readouterr().out


def test_a_long_text_gets_the_mean_logits_of_its_chunks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model reads 30 words at a time, and neighbouring chunks share 7."""
    words = random.Random(5).choices(WORDS, k=70)
    parts = [" ".join(words[start : start + 30]) for start in (0, 23, 46)]
    inputs = ["the film", " ".join(words), "der Film", *texts(40)]
    source = write(tmp_path / "a.tsv", "text\n" + "\n".join(inputs) + "\n")
    rows = run(model, source, "--long", "mean", "--batch-size", "3")
    assert [row["id"] for row in rows] == list(range(43))
    for i in (0, 2, 3, 42):
        check(model, rows[i], inputs[i])
    # Up to a constant, which softmax ignores, logits are the logarithms of probabilities.
    odds = np.exp(np.mean([np.log(probabilities(model, part)) for part in parts], axis=0))
    np.testing.assert_allclose(list(rows[1]["probabilities"].values()), odds / odds.sum(), atol=1e-5)
    assert abs(probabilities(model, inputs[1]) - odds / odds.sum()).max() > 0.01  # truncation gives something else
    log = capsys.readouterr().out
    assert "longer than 32 tokens and read in chunks: 1 of 43" in log and "warning" not in log


def test_windows_and_groups_of_chunks_do_not_change_the_means(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.tsv", "text\n" + "\n".join(texts(30, longest=150)) + "\n")
    expected = run(model, source, "--long", "mean")
    monkeypatch.setattr(predictor, "_WINDOW_ROWS", 7)
    monkeypatch.setattr(chunks, "_GROUP", 5)
    for row, other in zip(expected, run(model, source, "--long", "mean"), strict=True):
        assert row["id"] == other["id"]
        np.testing.assert_allclose(
            list(row["probabilities"].values()), list(other["probabilities"].values()), atol=1e-5
        )


def test_pairs_are_divided_and_a_pair_without_room_names_its_line(model: Path, tmp_path: Path) -> None:
    """Three special tokens and the two words of the other text leave room for 27 words, of which six are shared."""
    words = random.Random(6).choices(WORDS, k=40)
    source = write(tmp_path / "a.tsv", f"text\ttext_pair\nder Film\tgut\nthe film\t{' '.join(words)}\n")
    rows = run(model, source, "--long", "mean")
    check(model, rows[0], "der Film", "gut")
    parts = [" ".join(words[start : start + 27]) for start in (0, 21)]
    odds = np.exp(np.mean([np.log(probabilities(model, "the film", part)) for part in parts], axis=0))
    np.testing.assert_allclose(list(rows[1]["probabilities"].values()), odds / odds.sum(), atol=1e-5)
    both = " ".join(words)
    source = write(tmp_path / "b" / "b.tsv", f"text\ttext_pair\nder Film\tgut\n{both}\t{both}\n")
    message = error_of(model, source, "--long", "mean")
    assert message.startswith("b.tsv:3: even the shorter text of the pair has 40 tokens, which leave no room")
    assert len(run(model, source)) == 2


def test_a_text_beyond_the_limit_of_mean_is_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chunks, "CHARACTER_LIMIT", 1000)
    monkeypatch.setattr(predict_main, "CHARACTER_LIMIT", 1000)
    source = write(tmp_path / "a.tsv", f"text\n{'good ' * 5000}\nthe film\n")
    rows = run(model, source, "--long", "mean")
    # A thousand characters are 200 words: eight chunks of 30, which share 7, and the last of 16.
    parts = [np.log(probabilities(model, "good " * count)) for count in [30] * 8 + [16]]
    odds = np.exp(np.mean(parts, axis=0))
    np.testing.assert_allclose(list(rows[0]["probabilities"].values()), odds / odds.sum(), atol=1e-5)
    log = capsys.readouterr().out
    assert "\nwarning: 1 of 2 texts were read only up to 1,000 characters" in log
    assert "read in chunks: 1 of 2" in log


def test_progress_counts_each_row_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.tsv", "text\n" + "\n".join(texts(20, longest=1500)) + "\n")
    run(model, source, "--long", "mean", "--batch-size", "1")
    assert capsys.readouterr().out.count("predict: 20/20") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tother\na\tb\nc\n", "a.tsv:3: 1 column, expected 2"),
        ("a.tsv", "texte\na\n", "a.tsv:2: no column 'text' among 'texte'; did you mean 'texte'?"),
        ("a.tsv", "id\ttext\n", "a.tsv: no rows with text"),
        ("a.tsv", "", "a.tsv: no rows with text"),
        ("a.tsv", b"text\na\n\xff\n", "a.tsv:3: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a.csv", 'text\n"a\n', "a.csv:2: malformed CSV: unexpected end of data"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "p": NaN}\n', "a.jsonl:2: malformed JSON: NaN is not a JSON number"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "a.jsonl:1: malformed JSON: the key 'text' occurs twice"),
        ("a.jsonl", '{"text": "a\\ud800"}\n', "a.jsonl:1: column 'text' has half of a surrogate pair"),
        ("a.jsonl", '{"text": "a", "id": "\\ud800"}\n', "a.jsonl:1: column 'id' has half of a surrogate pair"),
        ("a.jsonl", '{"text": "a", "id": null}\n', "a.jsonl:1: column 'id' is null, expected text or a number"),
        ("a.jsonl", '{"text": "a", "id": true}\n', "a.jsonl:1: column 'id' is true or false, expected text or"),
        ("a.jsonl", '{"text": "a", "id": 1}\n{"text": "b"}\n', "a.jsonl:2: no column 'id' among 'text'"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b", "text_pair": "c"}\n',
            "a.jsonl:2: column 'text_pair' is not in the first row; add it to all rows, or to none",
        ),
        ("a.txt", "text\na\n", "a.txt: the ending '.txt' is not one of .tsv, .csv, .jsonl"),
    ],
)
def test_malformed_input_is_rejected_before_the_model_is_opened(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    assert error_of(Path("no-model"), write(tmp_path / name, content)).startswith(message)


def test_only_a_line_feed_ends_a_line(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "the\u2028film\u0085good"}\r\n')
    check(model, run(model, source)[0], "the\u2028film\u0085good")


@pytest.mark.parametrize(("name", "character"), [("semicolon", ";"), ("tab", "\t"), ("bar", "|")])
def test_a_csv_may_have_another_delimiter(model: Path, tmp_path: Path, name: str, character: str) -> None:
    rows = [["id", "text"], ["a", f'"the film{character} is good, fine"'], ["b", "der Film"]]
    source = write(tmp_path / "a.csv", "".join(character.join(row) + "\n" for row in rows))
    first, second = run(model, source, "--delimiter", name)
    assert (first["id"], second["id"]) == ("a", "b")
    check(model, first, f"the film{character} is good, fine")
    check(model, second, "der Film")
    source.with_name("a.csv.out").unlink()
    hint = f"save the file with ',', or pass --delimiter {name}"
    assert error_of(model, source).endswith(hint)


def test_a_delimiter_fits_the_format(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    expected = f"--delimiter is semicolon, but --input {path} is neither .tsv nor .csv"
    assert error_of(model, write(path, '{"text": "good"}\n'), "--delimiter", "semicolon") == expected
