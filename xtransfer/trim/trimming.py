"""Trimming a checkpoint: its tokenizer, the rows of its embeddings, and the report on both."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import CheckpointError, DataError, MachineError, UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.tokenizer import check_tokenizer, save_as_loaded
from xtransfer.models.hf.weights import STORED, leaves
from xtransfer.runs.classifier import load_run, selected_run, warn_of_pooling
from xtransfer.runs.find import check_selection
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import make_mesh, on_host, path_name
from xtransfer.trim import text
from xtransfer.trim.text import Agreement, Line
from xtransfer.trim.vocabulary import Limits, all_ids, lowest_fixed_ids, read_state, select, trimmed

CARD = "README.md"
TOKENIZER = "tokenizer.json"
_PER_PIECE = ("encoder.embeddings.word_embeddings.embedding", "decoder_bias")  # leaves with a row for every piece


@dataclass(frozen=True, eq=False)
class Source:
    """A model to trim.

    Attributes:
      name: the run or directory that the user named.
      architecture: the encoder's architecture.
      params: all parameters, float32: the encoder and whatever heads it has.
      tokenizer: a fast tokenizer.
      labels: the class names, in the order of the logits; None without a classification head.
      pooling: how the classifier pools, one of `heads.POOLINGS`.
      dtype: a key of `weights.STORED`, the dtype of the file to write.
      notes: further files of the directory to write, by name.
      multi_label: whether the classifier gives a text any number of labels.
    """

    name: Path
    architecture: EncoderConfig
    params: nnx.State
    tokenizer: Any
    labels: tuple[str, ...] | None
    pooling: str
    dtype: str = "float32"
    notes: Mapping[str, str] = field(default_factory=dict)
    multi_label: bool = False


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
      pieces: the number of rows of its word embeddings.
      parameters: the number of its parameters.
      weights: the bytes of its parameters.
      tokenizer: the bytes of its tokenizer.json.
    """

    pieces: int
    parameters: int
    weights: int
    tokenizer: int


@dataclass(frozen=True)
class Report:
    """The result of trimming.

    Attributes:
      before: the model's size.
      after: the trimmed model's size.
      complete: whether every piece that the text uses was kept.
      text: how both tokenizers split the text.
      check: the same for the text to check, if there is any.
    """

    before: Size
    after: Size
    complete: bool
    text: Agreement
    check: Agreement | None


def open_source(model: str, selection: str) -> Source:
    """Open a finished run of a workdir, a Hugging Face directory, a hub id, or an embedded checkpoint.

    Args:
      model: what the user named.
      selection: the protocol that selects a run's checkpoint, one of `SELECTIONS`.

    Raises:
      UserError: see `classifier.open_classifier`; a bare encoder is fine.
    """
    check_selection(selection)
    directory, mesh = hf_checkpoint.resolve(model), make_mesh()
    run = selected_run(directory, selection)
    if run is not None:
        trained = load_run(run, mesh)
        trained.tokenizer.model_max_length = trained.max_length  # as in export
        return Source(
            directory,
            trained.architecture,
            trained.params,
            trained.tokenizer,
            trained.labels,
            trained.pooling,
            multi_label=trained.multi_label,
        )
    tokenizer = load_tokenizer(directory)
    pooling = hf_config.read_pooling(directory)
    check_tokenizer(directory, tokenizer, pooling)
    params, dtype = hf_checkpoint.load_parameters(directory, mesh=mesh)
    head = leaves(params).get("head.bias")
    return Source(
        name=directory,
        architecture=hf_config.read_config(directory),
        params=params,
        tokenizer=tokenizer,
        labels=None if head is None else hf_config.class_names(directory, head.shape[0]),
        pooling=pooling,
        dtype=dtype,
        notes=_card(directory),
        multi_label=hf_config.is_multi_label(directory),
    )


def trim(
    source: Source, texts: Sequence[Path], column: str, limits: Limits, check: Path | None, output: Path
) -> Report:
    """Write the model with only the pieces that texts need, as a Hugging Face directory.

    The directory appears complete or not at all. If all pieces of the texts are kept, their tokens are the same as
    before, which is checked, and so are the vectors of their tokens.

    Args:
      source: the model.
      texts: the files whose pieces to keep, see `text.read`.
      column: the column with the texts.
      limits: which of these pieces to keep.
      check: a file of other texts to compare both tokenizers on.
      output: the directory to create.

    Raises:
      UserError: a file cannot be read, the tokenizer is of a kind that cannot be trimmed, or `output` is not empty.
    """

    def read(*paths: Path) -> Iterator[Line]:
        return text.read(paths, column)

    state = read_state(source.tokenizer)  # before anything else uses the tokenizer and sets its truncation
    usage = text.count(source.tokenizer, state["model"], read(*texts))
    if {*np.flatnonzero(usage.counts).tolist()} <= {*source.tokenizer.all_special_ids}:
        raise DataError(f"{source.name}: its vocabulary has no piece for any of the texts; give text that it can read")
    kept, complete = select(state, usage, _always(source, state), limits)
    tokenizer_before, tokenizer = _trimmed_tokenizer(source, trimmed(state, kept))
    _check_ids(source, state, kept, tokenizer)
    agreement = text.compare(source.tokenizer, tokenizer, kept, read(*texts))
    agreement_on_check = None if check is None else text.compare(source.tokenizer, tokenizer, kept, read(check))
    if complete and agreement.first:
        raise CheckpointError(
            f"{agreement.first}: the tokenizer of {source.name} would split this text into other pieces: it cannot be "
            "trimmed"
        )
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: on_host(leaf)[np.asarray(kept)] if path_name(path) in _PER_PIECE else leaf, source.params
    )
    pad_id = kept.index(_pad_id(source))
    architecture = dataclasses.replace(source.architecture, vocab_size=len(kept), pad_id=pad_id)
    warn_of_pooling(source.architecture.family, source.pooling, output)
    with terminal.deferred_stop(message=""):  # so that SIGTERM leaves no half-written hidden directory
        hf_checkpoint.save(
            output,
            architecture,
            params,
            tokenizer=tokenizer,
            labels=source.labels,
            pooling=source.pooling,
            dtype=source.dtype,
            notes={name: note + _notice(source, kept, agreement) for name, note in source.notes.items()},
            multi_label=source.multi_label,
        )
    return Report(
        before=_size(source.params, source, tokenizer_before),
        after=_size(params, source, (output / TOKENIZER).stat().st_size),
        complete=complete,
        text=agreement,
        check=agreement_on_check,
    )


def _always(source: Source, state: Mapping[str, Any]) -> set[int]:
    """Return the ids to keep whatever the text is."""
    # Positions of RoBERTa's family start after the pad id, so it must not change: keep all ids below it.
    below_first_position = range(source.architecture.position_offset)
    special = source.tokenizer.all_special_ids
    return {*below_first_position, *lowest_fixed_ids(state), *special, _pad_id(source)}


def _pad_id(source: Source) -> int:
    """Return the tokenizer's pad id, or else the model's."""
    pad_id = source.tokenizer.pad_token_id
    if pad_id is None:
        pad_id = source.architecture.pad_id
    if pad_id not in source.tokenizer.get_vocab().values():
        raise CheckpointError(
            f"{source.name}: pad_token_id is {pad_id} in its config.json, but its tokenizer has no such token"
        )
    return pad_id


def _trimmed_tokenizer(source: Source, state: Mapping[str, Any]) -> tuple[int, Any]:
    """Return the bytes of the original tokenizer.json, and the tokenizer of a trimmed `state`."""
    try:
        # SIGTERM waits, so that it leaves no temporary directory.
        with terminal.deferred_stop(message=""), tempfile.TemporaryDirectory() as temporary:
            save_as_loaded(source.tokenizer, Path(temporary))
            return (Path(temporary) / TOKENIZER).stat().st_size, _load_trimmed(source, state, Path(temporary))
    except OSError as error:
        raise MachineError(
            f"the tokenizer cannot be written to a temporary directory: {error.strerror or error}; free some space, or "
            "name another directory in TMPDIR"
        ) from error


def _load_trimmed(source: Source, state: Mapping[str, Any], directory: Path) -> Any:
    """Return the tokenizer as `transformers` loads it, from a directory with the files of the original one."""
    (directory / TOKENIZER).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    try:
        return load_tokenizer(directory)
    except UserError as error:
        reason = str(error).removeprefix(f"{directory}: ")
        raise CheckpointError(f"{source.name}: the trimmed tokenizer cannot be loaded: {reason}") from error


def _check_ids(source: Source, state: Mapping[str, Any], kept: Sequence[int], tokenizer: Any) -> None:
    """Refuse a tokenizer whose added tokens cannot move, or that `transformers` builds in another way."""
    new_ids = {old: new for new, old in enumerate(kept)}
    expected = {piece: new_ids[id_] for piece, id_ in all_ids(state).items() if id_ in new_ids}
    actual = tokenizer.get_vocab()
    different = sorted(piece for piece in expected.keys() | actual.keys() if expected.get(piece) != actual.get(piece))
    if different:
        piece = different[0]
        raise CheckpointError(
            f"{source.name}: token {piece!r} would get the id {actual.get(piece)} and not {expected.get(piece)}: "
            "its tokenizer cannot be trimmed"
        )


def _size(params: nnx.State, source: Source, tokenizer: int) -> Size:
    shapes = {path: np.shape(leaf[...]) for path, leaf in leaves(params).items()}
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    itemsize = np.dtype(STORED[source.dtype]).itemsize
    return Size(shapes[_PER_PIECE[0]][0], parameters, parameters * itemsize, tokenizer)


def _card(directory: Path) -> dict[str, str]:
    """Return the model card of a directory, if it has one."""
    card = directory / CARD
    return {CARD: card.read_text(encoding="utf-8", errors="replace")} if card.is_file() else {}


def _notice(source: Source, kept: Sequence[int], agreement: Agreement) -> str:
    """Return the section to add to the model card."""
    share = "All of them have" if agreement.same == agreement.texts else f"{agreement.same:,} of them have"
    return (
        f"\n## Trimmed vocabulary\n\n`xtransfer.trim` kept {len(kept):,} of {source.architecture.vocab_size:,} pieces, "
        f"those that {agreement.texts:,} texts need. {share} the same tokens as before, and so the same outputs. Other "
        "words fall back to smaller pieces, and characters that these texts lack may be unknown.\n"
    )
