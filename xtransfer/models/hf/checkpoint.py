"""Hugging Face directories: find them, load models from them, and write them."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError

from xtransfer import storage
from xtransfer.config import user_path
from xtransfer.errors import CheckpointError, ConfigError, MachineError, UserError, nearest, user_error
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier, MaskedLM
from xtransfer.models.hf import hub
from xtransfer.models.hf.config import (
    CONFIG,
    check_pretraining,
    class_names,
    is_multi_label,
    read_config,
    read_family,
    read_pooling,
    write_config,
)
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.tokenizer import save_tokenizer, special_ids
from xtransfer.models.hf.weights import WEIGHTS, WeightSource, dotted, find_weights, leaves, weight_files, write_weights
from xtransfer.runtime.sharding import on_host, param_shardings

EMBEDDED = Path(__file__).resolve().parents[2] / "pretrained"
_WITHOUT_HEAD = (
    "set `checkpoint` to the encoder that this classifier was trained from, or save this one without its head "
    "(AutoModel in transformers); no setting drops a trained head"
)


def resolve(name: str, revision: str | None = None, *, only_config: bool = False) -> Path:
    """Return the directory of a checkpoint.

    Args:
      name: an embedded name, a directory, or a hub id with an optional `@revision`.
      revision: a branch, tag, or commit for a hub id without one.
      only_config: fetch nothing but config.json from the hub.

    Raises:
      UserError: there is no such checkpoint.
    """
    if (EMBEDDED / name / CONFIG).is_file() and re.fullmatch(r"[\w.-]+", name):
        return EMBEDDED / name
    path = user_path(name)
    if name and path.is_dir():
        return path
    repo, _, pinned = name.partition("@")
    embedded = sorted(p.parent.name for p in EMBEDDED.glob(f"*/{CONFIG}"))
    if path.exists() or not hub.is_id(repo):
        raise CheckpointError(f"{name}: not a directory, a hub id, or an embedded checkpoint ({', '.join(embedded)})")
    if pinned and revision and pinned != revision:
        raise CheckpointError(f"{name}: two revisions, {pinned} and {revision}: choose one")
    try:
        return (hub.fetch_config if only_config else hub.fetch)(repo, pinned or revision)
    except UserError as error:
        raise user_error(error.exit_status, f"{error}{nearest(name, embedded)}") from error


def _unadapted(model: Any) -> Any:
    return model


def abstract_classifier(
    config: EncoderConfig,
    num_classes: int,
    *,
    pooling: str = "cls",
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    adapt: Callable[[Any], Any] = _unadapted,
) -> tuple[Any, nnx.State]:
    """Return the graphdef of a `Classifier` and the shapes and dtypes of its parameters, without any weights.

    `adapt` changes the model first, and returns it.
    """
    graphdef, shapes = _abstract_classifier(config, num_classes, pooling, jnp.dtype(dtype), remat, adapt)
    return graphdef, jax.tree.map(lambda leaf: leaf, shapes)  # a copy, because a state can be changed


@functools.lru_cache(maxsize=16)  # every run of an experiment asks for it, and tracing a deep encoder takes a while
def _abstract_classifier(
    config: EncoderConfig, num_classes: int, pooling: str, dtype: Any, remat: bool, adapt: Callable[[Any], Any]
) -> tuple[Any, nnx.State]:
    def make() -> Any:
        return adapt(Classifier(config, num_classes, rngs=_one_key(), pooling=pooling, dtype=dtype, remat=remat))

    return nnx.split(nnx.eval_shape(make))


def _one_key() -> Any:
    """Return a stand-in for `nnx.Rngs` where only shapes matter. It gives every parameter the same key.

    `nnx.Rngs` counts its keys, and traced, each count takes longer than the one before.
    """
    key = jax.random.key(0)
    return SimpleNamespace(params=lambda: key)


def load_classifier(
    directory: str | Path,
    num_classes: int,
    *,
    seed: int,
    pooling: str = "cls",
    dtype: DTypeLike = jnp.float32,
    labels: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    multi_label: bool | None = None,
) -> tuple[Any, nnx.State]:
    """Return the graphdef and the parameters, float32, of a `Classifier` with a checkpoint's weights.

    A head in the file is used, with its classes permuted by name. Otherwise the head is new.

    Args:
      directory: a Hugging Face directory.
      num_classes: K.
      seed: the seed of a new head.
      pooling: one of `heads.POOLINGS`.
      dtype: the compute dtype.
      labels: the class names, in order; None takes them from the file.
      mesh: the mesh that the parameters are laid out on, by `sharding.RULES`; None is the default device. The host
        holds one tensor at a time.
      multi_label: whether a head in the file must be one of a multi-label task, or of a single-label one; None accepts
        either.

    Raises:
      UserError: the head in the file has other classes, another pooling, or another kind of task, or the files do not
        fit.
    """
    graphdef, state = abstract_classifier(read_config(directory), num_classes, pooling=pooling, dtype=dtype)
    source, order = _open_classifier(directory, num_classes, pooling, labels, multi_label)
    return graphdef, source.fill(state, seed=seed, shardings=_layout(mesh, state), order=order)


def check_classifier(
    directory: str | Path,
    num_classes: int,
    *,
    pooling: str = "cls",
    dtype: DTypeLike = jnp.float32,
    labels: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    multi_label: bool | None = None,
) -> None:
    """Raise the errors that `load_classifier` would raise; see there for the arguments.

    This takes none of its memory, and little of its time.
    """
    _, state = abstract_classifier(read_config(directory), num_classes, pooling=pooling, dtype=dtype)
    source, _ = _open_classifier(directory, num_classes, pooling, labels, multi_label)
    source.check(state, shardings=_layout(mesh, state))


def _open_classifier(
    directory: str | Path, num_classes: int, pooling: str, labels: Sequence[str] | None, multi_label: bool | None
) -> tuple[WeightSource, dict[str, list[int]]]:
    """Return a checkpoint's tensors and the order of its classes, by the leaves of the head; see `load_classifier`."""
    source = WeightSource.open(directory, read_family(directory))
    order: dict[str, list[int]] = {}
    if "head.kernel" in source.targets:
        class_order = _label_order(Path(directory), num_classes, labels, source.targets["head.kernel"].shape[0])
        saved_pooling = read_pooling(directory)
        if saved_pooling != pooling:
            raise CheckpointError(
                f"{Path(directory) / CONFIG}: the classifier was trained with pooling {saved_pooling}, not {pooling}"
            )
        if multi_label is not None and is_multi_label(directory) != multi_label:
            raise CheckpointError(
                f"{Path(directory) / CONFIG}: the head was trained for {_kind(not multi_label)}, and the task has "
                f"{_kind(multi_label)}: {_WITHOUT_HEAD}"
            )
        order = {"head.kernel": class_order, "head.bias": class_order}
    return source, order


def _kind(multi_label: bool) -> str:
    return "any number of labels per text (multi-label)" if multi_label else "one label per text"


def trained_classes(directory: str | Path) -> tuple[str, ...]:
    """Return the names of the classes of a checkpoint's trained head, in the order of its logits.

    Raises:
      UserError: there is no such head, it has fewer than two classes, or config.json names another number of them.
    """
    head = WeightSource.open(directory, read_family(directory)).targets.get("head.kernel")
    if head is None:
        raise CheckpointError(
            f"{directory}: its weights have no trained classification head, so it cannot predict: name a fine-tuned "
            "classifier, or train one with python -m xtransfer.main"
        )
    if head.shape[:1] < (2,):
        raise CheckpointError(f"{directory}: tensor {head.name} has shape {list(head.shape)}: fewer than two classes")
    return class_names(directory, head.shape[0])


def has_language_model(directory: str | Path) -> bool:
    """Return whether a checkpoint's weights include the head of a masked language model."""
    return "decoder_bias" in WeightSource.open(directory, read_family(directory)).targets


def load_masked_lm(
    directory: str | Path,
    *,
    seed: int,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    config: EncoderConfig | None = None,
) -> tuple[Any, nnx.State]:
    """Return the graphdef and the parameters of a `MaskedLM` with a checkpoint's weights; see `load_classifier`.

    The model has a pooler and a next-sentence head if the file has them. A language model's head that the file lacks is
    new. A classification head stays in the file.

    Args:
      directory: a Hugging Face directory.
      seed: the seed of a new head.
      dtype: the compute dtype.
      mesh: where the parameters go.
      config: the checkpoint's architecture with other dropout rates; None reads it.

    Raises:
      UserError: the family has no rules for a language model's head, its decoder is not tied to the word embeddings,
        or the files do not fit.
    """
    check_pretraining(directory)
    architecture = config or read_config(directory)
    family = read_family(directory)
    source = WeightSource.open(directory, family)

    def make() -> MaskedLM:
        return MaskedLM(
            architecture,
            rngs=_one_key(),
            dtype=dtype,
            with_pooler=family.pools_in_encoder and "pooler.dense.kernel" in source.targets,
            with_next_sentence="next_sentence.kernel" in source.targets,
        )

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, source.fill(state, seed=seed, shardings=_layout(mesh, state))


def load_parameters(directory: str | Path, *, mesh: Mesh | None = None) -> tuple[nnx.State, str]:
    """Return all parameters in a checkpoint, the encoder and whatever heads it has, and the dtype of its files.

    Args:
      directory: a Hugging Face directory.
      mesh: where the parameters go, see `load_classifier`.

    Returns:
      The parameters, float32, under the paths of `Classifier` and `MaskedLM`; and a key of `weights.STORED`, which is
      "float32" if the files mix dtypes.

    Raises:
      UserError: the files do not fit, or the decoder of a language model is not tied to the word embeddings.
    """
    config, family = read_config(directory), read_family(directory)
    source = WeightSource.open(directory, family)
    if "decoder_bias" in source.targets:
        check_pretraining(directory)
    outputs = source.targets["head.kernel"].shape[0] if "head.kernel" in source.targets else 1

    def make() -> list[Classifier | MaskedLM]:
        models: list[Classifier | MaskedLM] = [Classifier(config, outputs, rngs=_one_key())]
        if family.pretrains:
            with_next_sentence = "next_sentence.kernel" in source.targets
            models.append(MaskedLM(config, rngs=_one_key(), with_next_sentence=with_next_sentence))
        return models

    states = (nnx.split(model)[1] for model in nnx.eval_shape(make))
    abstract = nnx.merge_state(*states)
    filled = source.fill(abstract, seed=0, shardings=_layout(mesh, abstract))
    present = [(path, leaf) for path, leaf in nnx.to_flat_state(filled) if dotted(path) in source.targets]
    dtypes = {source.targets[dotted(path)].dtype for path, _ in present}
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"
    return nnx.from_flat_state(present), stored


def _layout(mesh: Mesh | None, state: nnx.State) -> Any:
    return None if mesh is None else param_shardings(mesh, state)


def _label_order(directory: Path, num_classes: int, labels: Sequence[str] | None, outputs: int) -> list[int]:
    """Return, for each class of `labels`, its index in the file's head."""
    names = class_names(directory, outputs)
    path = directory / CONFIG
    if len(names) != outputs:
        raise CheckpointError(f"{path}: id2label names {len(names)} classes, but the head in the weights has {outputs}")
    if labels is None:
        labels = names
    if len(labels) != num_classes:
        raise CheckpointError(
            f"{path}: the head has {len(names)} classes ({', '.join(names)}), expected {num_classes}: {_WITHOUT_HEAD}"
        )
    if sorted(labels) != sorted(names):
        remedy = _WITHOUT_HEAD
        if len(labels) == len(names):
            remedy = f"if they are the same classes, write the task's names into id2label; otherwise {remedy}"
        raise CheckpointError(
            f"{path}: the head's classes are {', '.join(names)}, the task's are {', '.join(labels)}: {remedy}"
        )
    return [names.index(label) for label in labels]


def save(
    directory: str | Path,
    config: EncoderConfig,
    params: nnx.State,
    *,
    tokenizer: Any = None,
    labels: Sequence[str] | None = None,
    pooling: str = "cls",
    dtype: str = "float32",
    notes: Mapping[str, str] = MappingProxyType({}),
    multi_label: bool = False,
) -> None:
    """Write a directory that `transformers` and this module load; it appears complete or not at all.

    Args:
      directory: must be empty or not exist.
      config: the architecture.
      params: the parameters of a `Classifier`, a `MaskedLM`, or an encoder and pooler. Their paths decide the name of
        the architecture.
      tokenizer: saved beside the model, if any.
      labels: the class names, in order.
      pooling: one of `heads.POOLINGS`. If the family's class in `transformers` has no such pooling, the classifier is
        marked in config.json, and only this module reads it correctly.
      dtype: float16 and bfloat16 halve the file, which is read back as float32.
      notes: further text files, by name.
      multi_label: whether a text has any number of the labels, and not exactly one.

    Raises:
      UserError: the directory is not empty or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} already exists; choose a new directory")
    paths = frozenset(leaves(params))
    try:
        with storage.atomic_directory(directory) as partial:
            ids = special_ids(tokenizer)
            write_config(partial / CONFIG, config, paths, labels, pooling, ids, multi_label=multi_label)
            write_weights(partial / WEIGHTS, params, FAMILIES[config.family], dtype)
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
            for name, text in notes.items():
                (partial / name).write_text(text, encoding="utf-8")
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors writes files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{directory}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def description_files(directory: str | Path) -> list[Path]:
    """Return a checkpoint's config and tokenizer files."""
    patterns = (CONFIG, *hub.TOKENIZER_FILES)
    return sorted({path for pattern in patterns for path in Path(directory).glob(pattern)})


def fingerprint_files(directory: str | Path) -> str:
    """Return the sha256 over the names and bytes of a checkpoint's config, weights, and tokenizer files."""
    paths = {*description_files(directory), find_weights(directory), *weight_files(directory)}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {storage.sha256(path)}\n".encode())
    return digest.hexdigest()


def fingerprint_params(params: nnx.State) -> str:
    """Return the sha256 over the paths, shapes, dtypes, and bytes of all leaves, in the order of their paths.

    If processes share the parameters, all of them must call this.
    """
    return _digest((path, on_host(variable[...])) for path, variable in sorted(leaves(params).items()))


def fingerprint_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Return `fingerprint_params` of parameters by dotted path."""
    return _digest(sorted(arrays.items()))


def _digest(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for path, array in arrays:
        digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
