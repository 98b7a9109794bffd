"""The output of predict appears complete or not at all, whatever fails or ends the run."""

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import predicting
from tests.helpers.predicting import error_of, temporary, write
from xtransfer.errors import UserError
from xtransfer.predict import __main__ as predict
from xtransfer.predict import predictor
from xtransfer.runtime import terminal


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predicting.classifier(tmp_path_factory.mktemp("model"))


def test_wrong_model_length_or_output_is_rejected(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "text\na\n")
    assert "no trained" in error_of(model.parent / "base", source)
    assert error_of(model, source, "--max-length", "33").startswith("--max-length 33 is more than the 32 positions")
    assert error_of(model, source, "--max-length", "2").startswith("max_length 2 leaves no room for text")
    flags = ["--model", "no-model", "--input", str(source), "--output"]
    with pytest.raises(UserError, match="a.tsv is the input"):
        predict.main([*flags, str(source), "--overwrite"])
    with pytest.raises(UserError, match="not a file; choose another --output"):
        predict.main([*flags, str(tmp_path), "--overwrite"])
    with pytest.raises(UserError, match="cannot be written: "):
        predict.main([*flags, str(source / "out.jsonl")])
    existing = write(tmp_path / "existing.jsonl", "mine")
    with pytest.raises(UserError, match="existing.jsonl already exists; choose another --output, or pass --overwrite"):
        predict.main([*flags, str(existing)])
    assert existing.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_leftovers_of_a_killed_run_are_overwritten_but_a_running_one_is_not(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\n")
    output = tmp_path / "out.jsonl"
    flags = ["--model", str(model), "--input", str(source), "--output", str(output)]
    running = predict.Output(output, source, overwrite=False)
    running.write(iter(["half a line"]))
    with pytest.raises(UserError, match="another process is writing it"):
        predict.main(flags)
    assert temporary(output).read_text() == "half a line"
    running._file.close()  # as when a process is killed: the file stays, and the lock is released
    predict.main(flags)
    assert len(output.read_text().splitlines()) == 1 and not temporary(output).exists()


def test_full_disk_is_a_one_line_error_and_keeps_the_old_output(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.tsv", "text\n" + "the film\n" * 3000)
    output = write(tmp_path / "out.jsonl", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match="out.jsonl cannot be written: File too large"):
            predict.main(["--model", str(model), "--input", str(source), "--output", str(output), "--overwrite"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert output.read_text() == "old" and not temporary(output).exists()


def test_tokenizer_failures_and_non_finite_logits_name_the_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\nbad luck\nder Film\n")
    tokenize = predictor.tokenize

    def failing(tokenizer: Any, texts: list[str], *rest: Any) -> Any:
        if any("luck" in text for text in texts):
            raise UserError("the tokenizer fails")
        return tokenize(tokenizer, texts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "tokenize", failing)
        assert error_of(model, source) == "a.tsv:3: the tokenizer fails"

    forward = predictor.inference.forward

    def with_nan(*args: Any) -> Any:
        for tag, logits in forward(*args):
            yield tag, np.where(np.arange(len(logits))[:, None] == 1, np.nan, logits)

    monkeypatch.setattr(predictor.inference, "forward", with_nan)
    assert error_of(model, source).startswith("a.tsv:3: the logits are not finite")


def test_input_that_changes_while_it_is_read_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\nder Film\n")
    open_classifier = predict.open_classifier

    def change_input(*args: Any, **kwargs: Any) -> Any:
        write(source, "text\nthe film\n")
        return open_classifier(*args, **kwargs)

    monkeypatch.setattr(predict, "open_classifier", change_input)
    assert error_of(model, source) == "a.tsv changed while it was read: it had 2 rows with text, then 1"


@pytest.mark.parametrize(
    ("number", "status", "prefix"), [(signal.SIGTERM, 143, "stopped: "), (signal.SIGINT, 130, "interrupted: ")]
)
@pytest.mark.parametrize("during", ["open_classifier", "forward"])
def test_signal_leaves_no_output(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
    prefix: str,
    during: str,
) -> None:
    source, output = write(tmp_path / "a.tsv", "text\nthe film\n"), tmp_path / "out.jsonl"
    module = predict if during == "open_classifier" else predictor.inference
    function, returned = getattr(module, during), []

    def with_signal(*args: Any, **kwargs: Any) -> Any:
        assert temporary(output).exists()
        # The handler must not raise: Python drops an exception raised inside a garbage collection callback.
        signal.raise_signal(number)
        returned.append(during)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, during, with_signal)
    monkeypatch.setattr(terminal, "_stop", threading.Event())
    monkeypatch.setattr(terminal, "_interrupted", threading.Event())
    handler = signal.signal(signal.SIGTERM, terminal._terminate)
    ctrl_c = signal.signal(signal.SIGINT, terminal._interrupt)
    try:
        with pytest.raises(SystemExit) as exit_:
            predict.main(["--model", str(model), "--input", str(source), "--output", str(output)])
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, ctrl_c)
    assert returned == [during] and exit_.value.code == status
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]
    assert capsys.readouterr().err == f"{prefix}{output} was not written\n"


def test_symlink_at_the_temporary_path_is_not_followed(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "text\nthe film\n")
    temporary(tmp_path / "o.jsonl").symlink_to(source)
    with pytest.raises(UserError, match="o.jsonl cannot be written"):
        predict.main(["--model", str(model), "--input", str(source), "--output", str(tmp_path / "o.jsonl")])
    assert source.read_text() == "text\nthe film\n"
