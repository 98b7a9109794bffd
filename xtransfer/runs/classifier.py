"""A trained classifier, ready to predict or export: a run of a workdir, or a Hugging Face directory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import CheckpointError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.config import CONFIG
from xtransfer.models.hf.tokenizer import check_tokenizer
from xtransfer.runs import encoders
from xtransfer.runs.find import SelectedRun, check_selection, find_run, identify_run, list_runs
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import terminal
from xtransfer.train.checkpoints import CHECKPOINTS, Checkpoints
from xtransfer.train.compiled_steps import abstract_params

_MAX_LENGTH = 512  # for a Hugging Face classifier with more positions: attention grows with the square of a row


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A classifier with its tokenizer and weights.

    Attributes:
      source: the run or Hugging Face directory that the user named.
      directory: the Hugging Face directory with its architecture and tokenizer; a run's is in its workdir.
      architecture: the encoder's architecture.
      tokenizer: a fast tokenizer.
      graphdef: the graphdef of a `Classifier` with compute dtype `dtype`.
      params: its float32 parameters, on the mesh.
      labels: the class names, in the order of the logits.
      pooling: how it pools, one of `heads.POOLINGS`.
      max_length: the most tokens of an example, with special ones.
      dtype: the compute dtype, "float32" or "bfloat16".
      multi_label: whether it gives a text any number of labels, by a sigmoid for each class.
    """

    source: Path
    directory: Path
    architecture: EncoderConfig
    tokenizer: Any
    graphdef: Any
    params: Any
    labels: tuple[str, ...]
    pooling: str
    max_length: int
    dtype: str
    multi_label: bool = False


def open_classifier(directory: Path, mesh: jax.sharding.Mesh, *, selection: str = "source_dev") -> TrainedClassifier:
    """Open a run's directory in a workdir, or a Hugging Face classifier (a directory or a hub id).

    Args:
      directory: a directory of either kind.
      mesh: the mesh that the parameters are laid out on.
      selection: the protocol that selects a run's checkpoint, one of `SELECTIONS`.

    Raises:
      UserError: neither kind, a workdir without a run, a run that is not finished or whose base checkpoint has changed,
        an encoder without a trained head, or files that cannot be read.
    """
    check_selection(selection)
    directory = hf_checkpoint.resolve(str(directory))
    run = selected_run(directory, selection)
    return _open_classifier(directory, mesh) if run is None else load_run(run, mesh)


def selected_run(directory: Path, selection: str) -> SelectedRun | None:
    """Return the finished run that a directory holds, with its selected step; None for a Hugging Face directory.

    Raises:
      UserError: neither kind, a workdir without a run, or a run that is not finished.
    """
    workdir = _workdir_around(directory)
    if workdir is None:
        return None
    run = identify_run(workdir, directory)
    if run is None:
        is_root = directory.resolve() == workdir.root.resolve()
        problem = "a workdir" if is_root else f"not a run of the workdir {workdir.root}"
        raise CheckpointError(f"{directory}: {problem}: name the directory of a run; runs: {list_runs(workdir)}")
    draw, objective, seed = run
    return find_run(workdir.at(draw), objective, seed, selection)


def open_run(
    workdir: Workdir, objective: str, seed: int | None, selection: str, mesh: jax.sharding.Mesh
) -> TrainedClassifier:
    """Open the run of an objective (or "teacher") and seed; see `find_run` and `load_run`."""
    return load_run(find_run(workdir, objective, seed, selection), mesh)


def load_run(run: SelectedRun, mesh: jax.sharding.Mesh) -> TrainedClassifier:
    """Load a selected checkpoint onto the mesh. Config and tokenizer come from the workdir.

    Raises:
      UserError: the run's checkpoint cannot be read, or the workdir's files have changed; or the workdir has no such
        files, and the base checkpoint is gone or has changed.
    """
    settings = run.settings
    base = description_of(run)
    architecture = hf_config.read_config(base)
    graphdef, shapes = hf_checkpoint.abstract_classifier(
        architecture, len(run.task.labels), pooling=settings.pooling, dtype=jnp.dtype(settings.compute_dtype)
    )
    with Checkpoints(run.directory / CHECKPOINTS, read_only=True) as checkpoints:
        params = checkpoints.restore_params(run.step, abstract_params(shapes, mesh), run.item)
    return TrainedClassifier(
        source=run.directory,
        directory=base,
        architecture=architecture,
        tokenizer=load_tokenizer(base),
        graphdef=graphdef,
        params=params,
        labels=run.task.labels,
        pooling=settings.pooling,
        max_length=settings.max_length,
        dtype=settings.compute_dtype,
        multi_label=run.task.multi_label,
    )


def description_of(run: SelectedRun) -> Path:
    """Return the directory with the config and tokenizer of a run.

    Raises:
      UserError: the workdir's files have changed; or it has none, and the base checkpoint is gone or has changed.
    """
    saved = encoders.saved_encoder(run.workdir, run.task, run.role)
    if saved is not None:
        return saved.directory
    base = hf_checkpoint.resolve(run.settings.checkpoint)
    if hf_checkpoint.fingerprint_files(base) != run.fingerprint:
        raise CheckpointError(
            f"{base}: no longer the checkpoint that {run.directory} was trained from (the fingerprint of its files "
            f"differs from the one in {run.workdir.task}): restore the old files"
        )
    return base


def warn_of_pooling(family: str, pooling: str, output: Path) -> None:
    """Warn that `transformers` has no class for a classifier that is written to `output`, if it has none."""
    if not hf_config.transformers_pools(family, pooling):
        terminal.log(
            f"warning: this classifier pools by {pooling}, which transformers does not support: it would "
            f"load {output} without an error and compute other logits; use python -m xtransfer.predict instead"
        )


def _workdir_around(directory: Path) -> Workdir | None:
    """Return the workdir that is or contains a directory; None for any Hugging Face directory."""
    path = Path(os.path.abspath(directory))
    if (path / CONFIG).is_file() and not _is_workdir(path):
        return None
    # Try the path as it is written first: some directories of a workdir may be links to another disk.
    for candidate in (path, *path.parents, *path.resolve().parents):
        if _is_workdir(candidate):
            return Workdir(candidate)
    hf_config.refuse_adapter(path)
    raise CheckpointError(f"{directory}: neither a run of a workdir nor a Hugging Face directory, which has a {CONFIG}")


def _is_workdir(directory: Path) -> bool:
    workdir = Workdir(directory)
    return workdir.config.is_file() and workdir.task.is_file()


def _open_classifier(directory: Path, mesh: jax.sharding.Mesh) -> TrainedClassifier:
    architecture = hf_config.read_config(directory)
    labels = hf_checkpoint.trained_classes(directory)
    tokenizer = load_tokenizer(directory)
    pooling = hf_config.read_pooling(directory)
    check_tokenizer(directory, tokenizer, pooling)
    graphdef, params = hf_checkpoint.load_classifier(directory, len(labels), seed=0, pooling=pooling, mesh=mesh)
    positions = architecture.max_positions - architecture.position_offset
    return TrainedClassifier(
        source=directory,
        directory=directory,
        architecture=architecture,
        tokenizer=tokenizer,
        graphdef=graphdef,
        params=params,
        labels=labels,
        pooling=pooling,
        max_length=min(_MAX_LENGTH, positions, tokenizer.model_max_length),
        dtype="float32",
        multi_label=hf_config.is_multi_label(directory),
    )
