"""The predict binary: every text as if it were alone, in order; faults are named, nothing half-written."""

import functools
import json
import math
import random
import resource
import signal
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from xtransfer import cli, predict
from xtransfer.data import files
from xtransfer.data.text import load_tokenizer
from xtransfer.errors import UserError
from xtransfer.models import hf

LABELS = ("gut", "böse", "so-so")
LENGTH = 32  # positions of the model
WORDS = sorted({word for table in (tiny.GOOD, tiny.BAD, tiny.FILLER) for group in table.values() for word in group})
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face classifier with three classes and a head that tells texts apart."""
    root = tmp_path_factory.mktemp("model")
    base = tiny.checkpoint(root / "base")
    config = hf.read_config(base)
    graphdef, params = hf.load_classifier(base, len(LABELS), seed=1)
    params["head"] = jax.tree.map(lambda leaf: leaf * 50, params["head"])
    hf.save(root / "classifier", config, params, tokenizer=load_tokenizer(base), labels=LABELS)
    return root / "classifier"


def run(model: Path, source: Path, *flags: str) -> Rows:
    """The rows that the binary writes."""
    output = source.parent / f"{source.name}.out"
    predict.main(["--model", str(model), "--input", str(source), "--output", str(output), "--overwrite", *flags])
    assert not temporary(output).exists()
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]


def temporary(output: Path) -> Path:
    return output.with_name(f".{output.name}.tmp")


def refused(model: Path, source: Path, *flags: str) -> str:
    """The message; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        run(model, source, *flags)
    assert {path.name for path in source.parent.iterdir()} <= {source.name}
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{source.parent}/")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(n: int, longest: int = 12, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


@functools.cache
def forward(model: Path) -> tuple[Any, Any]:
    """The tokenizer, and the compiled batch -> logits."""
    graphdef, params = hf.load_classifier(model, len(hf.read_labels(model) or ()), seed=0)
    return load_tokenizer(model), jax.jit(lambda batch: nnx.merge(graphdef, params)(batch))


def probabilities(model: Path, text: str, pair: str | None = None) -> np.ndarray:
    """[K] of one text, alone in its batch."""
    tokenizer, logits = forward(model)
    tokens = tokenizer(text, pair, truncation=True, max_length=LENGTH, return_token_type_ids=True)
    ids = np.zeros((3, 1, LENGTH), np.int32)
    for row, key in zip(ids, ("input_ids", "token_type_ids", "attention_mask"), strict=True):
        row[0, : len(tokens[key])] = tokens[key]
    batch = {
        "input_ids": ids[0],
        "token_type_ids": ids[1],
        "segment_ids": ids[2],
        "position_ids": np.arange(LENGTH, dtype=np.int32)[None] + hf.read_config(model).position_offset,
        "cls_index": np.zeros((1, 1), np.int32),
    }
    found = np.asarray(logits(batch), np.float64)[0, 0]
    return np.exp(found) / np.exp(found).sum()


def check(model: Path, row: dict[str, Any], text: str, pair: str | None = None) -> None:
    expected, labels = probabilities(model, text, pair), hf.read_labels(model) or ()
    assert list(row) == ["id", "label", "probabilities"] and tuple(row["probabilities"]) == labels
    np.testing.assert_allclose(list(row["probabilities"].values()), expected, atol=1e-5)
    assert row["label"] == labels[int(expected.argmax())]
    assert math.isclose(sum(row["probabilities"].values()), 1, abs_tol=1e-5)


def test_every_row_in_order_as_if_it_were_alone(model: Path, tmp_path: Path) -> None:
    said = texts(300)
    source = write(tmp_path / "a.tsv", "id\ttext\n" + "".join(f"n{i}\t{t}\n" for i, t in enumerate(said)))
    found = run(model, source, "--batch-size", "3")
    assert [row["id"] for row in found] == [f"n{i}" for i in range(300)]
    assert len({row["label"] for row in found}) > 1
    for i in (0, 1, 17, 150, 298, 299):
        check(model, found[i], said[i])


def test_positions_and_padding_are_those_of_the_family(tmp_path: Path) -> None:
    classifier, said = tiny.roberta(tmp_path / "roberta"), texts(60)
    source = write(tmp_path / "in" / "a.tsv", "text\n" + "\n".join(said) + "\n")
    for text, row in list(zip(said, run(classifier, source), strict=True))[::7]:
        check(classifier, row, text)


def test_windows_make_one_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts(50)))
    whole = run(model, source)
    monkeypatch.setattr(predict, "_WINDOW_ROWS", 7)
    by_rows = run(model, source)
    monkeypatch.setattr(predict, "_WINDOW_CHARACTERS", 100)
    by_characters = run(model, source)
    for found in (by_rows, by_characters):
        assert [row["id"] for row in found] == list(range(50))
        for one, other in zip(whole, found, strict=True):
            np.testing.assert_allclose(
                list(one["probabilities"].values()), list(other["probabilities"].values()), atol=1e-5
            )


def test_pairs_and_ids_are_taken_where_they_are_and_keep_their_type(model: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "007", "text": "the film", "text_pair": "is good"},
        {"id": 7, "text": "der Film", "text_pair": "ist schlecht"},
        {"id": 0.5, "text": "der Film", "text_pair": "ist schlecht sehr"},
    ]
    source = write(tmp_path / "a.jsonl", "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    found = run(model, source)
    assert [row["id"] for row in found] == ["007", 7, 0.5]
    for row, given in zip(found, rows, strict=True):
        check(model, row, given["text"], given["text_pair"])  # type: ignore[arg-type]
    alone = run(model, source, "--pair-column", "", "--id-column", "")
    assert [row["id"] for row in alone] == [0, 1, 2]
    check(model, alone[1], "der Film")


def test_columns_may_have_other_names(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", 'key,first,second\r\n1,"the ""film""",is good\r\n')
    found = run(model, source, "--text-column", "first", "--pair-column", "second", "--id-column", "key")
    assert found[0]["id"] == "1"
    check(model, found[0], 'the "film"', "is good")


def test_long_texts_are_truncated_and_huge_ones_clipped_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(texts(1, seed=3)[0].split() * 40)
    huge = "good " * 4_000_000
    source = write(tmp_path / "a.tsv", f"text\n{long}\n{huge}\nthe film\n")
    tracemalloc.start()  # for reading only: it makes tracing and compiling several times slower
    rows = list(files.read_texts(files.look_at(source, "text", None, None, skip_empty=False)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 3 and peak < 5 * len(huge), f"{peak / len(huge):.1f} times the text"
    found = run(model, source)
    check(model, found[0], long)
    check(model, found[1], huge[:1000])
    check(model, found[2], "the film")
    assert "3 rows" in (said := capsys.readouterr().out) and "very long texts, clipped: 2" in said
    check(model, run(model, source, "--max-length", "4")[2], "the film")
    assert run(model, source, "--max-length", "4")[0] != found[0]


def test_empty_text_is_an_error_or_skipped_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\n \nder Film\n\n")
    message = "a.tsv:3: column 'text' is empty; mend it, or give --empty-text skip"
    assert refused(model, source) == message
    assert [row["id"] for row in run(model, source, "--empty-text", "skip")] == [0, 2]
    assert "rows without text, skipped: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tother\na\tb\nc\n", "a.tsv:3: 1 column, expected 2"),
        ("a.tsv", "texte\na\n", "a.tsv:2: no column 'text' among 'texte'; did you mean 'texte'?"),
        ("a.tsv", "id\ttext\n", "a.tsv: no rows with text"),
        ("a.tsv", "", "a.tsv: no rows with text"),
        ("a.tsv", b"text\na\n\xff\n", "a.tsv:3: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("a.csv", 'text\n"a\n', "a.csv:2: malformed CSV: unexpected end of data"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "p": NaN}\n', "a.jsonl:2: malformed JSON: NaN is no JSON number"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "a.jsonl:1: malformed JSON: the key 'text' occurs twice"),
        ("a.jsonl", '{"text": "a\\ud800"}\n', "a.jsonl:1: column 'text' has half of a surrogate pair"),
        ("a.jsonl", '{"text": "a", "id": "\\ud800"}\n', "a.jsonl:1: column 'id' has half of a surrogate pair"),
        ("a.jsonl", '{"text": "a", "id": null}\n', "a.jsonl:1: column 'id' is null, expected text or a number"),
        ("a.jsonl", '{"text": "a", "id": true}\n', "a.jsonl:1: column 'id' is true or false, expected text or"),
        ("a.jsonl", '{"text": "a", "id": 1}\n{"text": "b"}\n', "a.jsonl:2: no column 'id' among 'text'"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b", "text_pair": "c"}\n',
            "a.jsonl:2: column 'text_pair' is not in the first row; give it to all rows, or to none",
        ),
        ("a.txt", "text\na\n", "a.txt: the ending '.txt' is not one of .tsv, .csv, .jsonl"),
    ],
)
def test_malformed_input_is_refused_before_the_model_is_opened(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    assert refused(Path("no-model"), write(tmp_path / name, content)).startswith(message)


def test_only_a_line_feed_ends_a_line(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "the\u2028film\u0085good"}\r\n')
    check(model, run(model, source)[0], "the\u2028film\u0085good")


def test_a_wrong_model_length_or_output_is_refused(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "text\na\n")
    assert "no trained" in refused(model.parent / "base", source)
    assert refused(model, source, "--max-length", "33").startswith("--max-length 33 is more than the 32 positions")
    assert refused(model, source, "--max-length", "2").startswith("max_length 2 leaves no room for text")
    flags = ["--model", "no-model", "--input", str(source), "--output"]
    with pytest.raises(UserError, match="a.tsv: is the input"):
        predict.main([*flags, str(source), "--overwrite"])
    with pytest.raises(UserError, match="not a file; give another --output"):
        predict.main([*flags, str(tmp_path), "--overwrite"])
    with pytest.raises(UserError, match="cannot be written: "):
        predict.main([*flags, str(source / "out.jsonl")])
    kept = write(tmp_path / "kept.jsonl", "mine")
    with pytest.raises(UserError, match="kept.jsonl: exists already"):
        predict.main([*flags, str(kept)])
    assert kept.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_run_left_is_overwritten_and_a_second_run_refused(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\n")
    output = tmp_path / "out.jsonl"
    flags = ["--model", str(model), "--input", str(source), "--output", str(output)]
    first = predict.Output(output, source, overwrite=False)
    first.write(iter(["half a line"]))
    with pytest.raises(UserError, match="another process is writing it"):
        predict.main(flags)
    assert temporary(output).read_text() == "half a line"
    first._file.close()  # as a kill does: the file stays, the lock goes
    predict.main(flags)
    assert len(output.read_text().splitlines()) == 1 and not temporary(output).exists()


def test_a_full_disk_is_one_line_and_keeps_the_old_output(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.tsv", "text\n" + "the film\n" * 3000)
    output = write(tmp_path / "out.jsonl", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(UserError, match="out.jsonl cannot be written: File too large"):
            predict.main(["--model", str(model), "--input", str(source), "--output", str(output), "--overwrite"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert output.read_text() == "old" and not temporary(output).exists()


def test_a_text_that_the_tokenizer_fails_on_and_logits_that_are_not_finite_name_their_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\nbad luck\nder Film\n")
    tokenize = predict.tokenize

    def failing(tokenizer: Any, said: list[str], *rest: Any) -> Any:
        if any("luck" in text for text in said):
            raise UserError("the tokenizer fails")
        return tokenize(tokenizer, said, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "tokenize", failing)
        assert refused(model, source) == "a.tsv:3: the tokenizer fails"

    forward = predict.inference.forward

    def broken(*args: Any) -> Any:
        for tag, logits in forward(*args):
            yield tag, np.where(np.arange(len(logits))[:, None] == 1, np.nan, logits)

    monkeypatch.setattr(predict.inference, "forward", broken)
    assert refused(model, source).startswith("a.tsv:3: the logits are not finite")


def test_a_file_that_changes_while_it_is_read_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\nder Film\n")
    opened = predict.open_trained

    def meanwhile(*args: Any, **more: Any) -> Any:
        write(source, "text\nthe film\n")
        return opened(*args, **more)

    monkeypatch.setattr(predict, "open_trained", meanwhile)
    assert refused(model, source) == "a.tsv: had 2 rows, then 1: it was changed while it was read"


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 143, "stopped: "), (signal.SIGINT, 130, "interrupted: ")]
)
@pytest.mark.parametrize("when", ["open_trained", "forward"])
def test_a_signal_leaves_no_output(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
    said: str,
    when: str,
) -> None:
    source, output = write(tmp_path / "a.tsv", "text\nthe film\n"), tmp_path / "out.jsonl"
    place = predict if when == "open_trained" else predict.inference
    interrupted, reached = getattr(place, when), []

    def signalled(*args: Any, **more: Any) -> Any:
        assert temporary(output).exists()
        # What a signal raises inside a callback of the garbage collector is printed and lost: it may raise nothing.
        signal.raise_signal(number)
        reached.append(when)
        return interrupted(*args, **more)

    monkeypatch.setattr(place, when, signalled)
    monkeypatch.setattr(cli, "_stop", threading.Event())
    handler = signal.signal(signal.SIGTERM, cli._terminate)
    # Whoever starts the tests in the background has them ignore Ctrl-C, and predict with them.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as exit_:
            predict.main(["--model", str(model), "--input", str(source), "--output", str(output)])
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, ctrl_c)
    assert reached == [when] and exit_.value.code == status
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]
    assert capsys.readouterr().err == f"{said}{output} is not written\n"


def test_a_link_where_the_output_is_prepared_is_not_followed(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\n")
    temporary(tmp_path / "o.jsonl").symlink_to(source)
    with pytest.raises(UserError, match="o.jsonl cannot be written"):
        predict.main(["--model", str(model), "--input", str(source), "--output", str(tmp_path / "o.jsonl")])
    assert source.read_text() == "text\nthe film\n"
