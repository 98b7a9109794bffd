"""The predict binary's output is there whole or not at all, whatever fails or ends the run."""

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import predicting
from tests.helpers.predicting import refused, temporary, write
from xtransfer.errors import UserError
from xtransfer.predict import __main__ as predict
from xtransfer.predict import predictor
from xtransfer.runtime import terminal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predicting.classifier(tmp_path_factory.mktemp("model"))


def test_a_wrong_model_length_or_output_is_refused(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "text\na\n")
    assert "no trained" in refused(model.parent / "base", source)
    assert refused(model, source, "--max-length", "33").startswith("--max-length 33 is more than the 32 positions")
    assert refused(model, source, "--max-length", "2").startswith("max_length 2 leaves no room for text")
    flags = ["--model", "no-model", "--input", str(source), "--output"]
    with pytest.raises(UserError, match="a.tsv is the input"):
        predict.main([*flags, str(source), "--overwrite"])
    with pytest.raises(UserError, match="not a file; choose another --output"):
        predict.main([*flags, str(tmp_path), "--overwrite"])
    with pytest.raises(UserError, match="cannot be written: "):
        predict.main([*flags, str(source / "out.jsonl")])
    kept = write(tmp_path / "kept.jsonl", "mine")
    with pytest.raises(UserError, match="kept.jsonl already exists; choose another --output, or pass --overwrite"):
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
    tokenize = predictor.tokenize

    def failing(tokenizer: Any, said: list[str], *rest: Any) -> Any:
        if any("luck" in text for text in said):
            raise UserError("the tokenizer fails")
        return tokenize(tokenizer, said, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "tokenize", failing)
        assert refused(model, source) == "a.tsv:3: the tokenizer fails"

    forward = predictor.inference.forward

    def broken(*args: Any) -> Any:
        for tag, logits in forward(*args):
            yield tag, np.where(np.arange(len(logits))[:, None] == 1, np.nan, logits)

    monkeypatch.setattr(predictor.inference, "forward", broken)
    assert refused(model, source).startswith("a.tsv:3: the logits are not finite")


def test_a_file_that_changes_while_it_is_read_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\nder Film\n")
    opened = predict.open_classifier

    def meanwhile(*args: Any, **more: Any) -> Any:
        write(source, "text\nthe film\n")
        return opened(*args, **more)

    monkeypatch.setattr(predict, "open_classifier", meanwhile)
    assert refused(model, source) == "a.tsv: had 2 rows, then 1: it changed while it was read"


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 143, "stopped: "), (signal.SIGINT, 130, "interrupted: ")]
)
@pytest.mark.parametrize("when", ["open_classifier", "forward"])
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
    place = predict if when == "open_classifier" else predictor.inference
    interrupted, reached = getattr(place, when), []

    def signalled(*args: Any, **more: Any) -> Any:
        assert temporary(output).exists()
        # What a signal raises inside a callback of the garbage collector is printed and lost: it may raise nothing.
        signal.raise_signal(number)
        reached.append(when)
        return interrupted(*args, **more)

    monkeypatch.setattr(place, when, signalled)
    monkeypatch.setattr(terminal, "_stop", threading.Event())
    handler = signal.signal(signal.SIGTERM, terminal._terminate)
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
