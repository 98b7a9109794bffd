"""Compute, save, and load a reference: a checkpoint's activations in PyTorch and `transformers`.

Only this module and `benchmark.peer` import PyTorch or a model of `transformers`. They do so inside functions, because
nothing else needs them. A reference is saved as safetensors, so that machines without PyTorch can compare with it.

Activations: `embeddings` is the input of the first layer, and `layer_1`, `layer_2`, … are the outputs of the layers.
`pooled` is the input of the head's last linear layer (for BERT without a head, the pooler's output), and `logits` is
that layer's output.
"""

import hashlib
import importlib.util
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from xtransfer import storage
from xtransfer.errors import CheckpointError, MachineError, one_line
from xtransfer.models.hf.config import (
    CONFIG,
    class_names,
    is_multi_label,
    read_config,
    read_family,
    read_pooling,
    write_config,
)
from xtransfer.models.hf.pytorch_file import PytorchFile
from xtransfer.models.hf.weight_map import Family
from xtransfer.models.hf.weights import SAFETENSORS, WeightSource, find_weights, weight_files

FILE = "reference.safetensors"  # the name of a reference beside its checkpoint
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_FORMAT = "xtransfer-reference-1"


@dataclass(frozen=True, eq=False)
class Reference:
    """The inputs and outputs of a model in `transformers`.

    There are N examples of up to S tokens, T tokens in all without padding, H hidden units, K classes, and V words.

    Attributes:
      inputs: input_ids, attention_mask, and token_type_ids, each [N, S] int32, with padding at the end of a row.
      activations: float32 arrays by name, in the order of computation. embeddings and layer_1, … are [T, H], row by row
        without padding. pooled [N, H] and logits [N, K] exist if the checkpoint computes them. A masked language
        model has prediction_logits [T, V], and a BertForPreTraining also seq_relationship_logits [N, 2].
      weights: the sha256 of the weights; see `fingerprint`.
      made_with: the versions of the libraries that computed the reference.
      labels: [N] int32, or None.
      gradients: the gradients of the labels' mean cross-entropy, float32, by the tensor's name in the checkpoint.
    """

    inputs: Mapping[str, np.ndarray]
    activations: Mapping[str, np.ndarray]
    weights: str
    made_with: str
    labels: np.ndarray | None = None
    gradients: Mapping[str, np.ndarray] = field(default_factory=dict)


def available() -> bool:
    """Return whether PyTorch is installed, which `compute` needs."""
    return importlib.util.find_spec("torch") is not None


def fingerprint(directory: str | Path) -> str:
    """Return one sha256 for a checkpoint's files of weights, taken in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(Path(directory)):
        digest.update(bytes.fromhex(storage.sha256(path)))
    return digest.hexdigest()


def compute(
    directory: str | Path,
    inputs: Mapping[str, np.ndarray],
    labels: np.ndarray | None = None,
    *,
    architecture: str | None = None,
) -> Reference:
    """Run a checkpoint in `transformers`, in float32 and without dropout.

    Args:
      directory: the checkpoint. Its weights are read from the files of `weight_files`, and no code in it is run.
      inputs: see `Reference.inputs`. A model without token types does not get them.
      labels: [N] classes, to also compute gradients. The checkpoint then needs a classification head.
      architecture: a class of `transformers`. None is the sequence classifier if the checkpoint has its head, or else
        the bare encoder.

    Raises:
      UserError: PyTorch is not installed, or `transformers` cannot load all of the checkpoint.
    """
    if not available():
        raise MachineError("PyTorch is not installed; install torch, or pass a reference that was recorded elsewhere")
    import torch
    import transformers

    weights = fingerprint(directory)  # first, because its error for missing weights is clearer
    _check_pytorch_files(directory)
    family = read_family(directory)
    source = WeightSource.open(directory, family)
    with _in_known_class(source) as loadable:
        model, missing = _load(loadable, architecture, family, has_head="head.kernel" in source.targets)
    accepted = inspect.signature(model.forward).parameters
    arguments = {name: torch.from_numpy(inputs[name]).long() for name in INPUTS if name in accepted}
    pooled: list[Any] = []
    last_layer = _last_layer_of_head(model)
    if last_layer is not None:
        last_layer.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    with torch.set_grad_enabled(labels is not None):
        outputs = model(**arguments, output_hidden_states=True)
    # Only in some families does the bare encoder have a trained pooler. In the others no head reads it.
    trained = family.pools_in_encoder and not any("pooler" in name for name in missing)
    if not pooled and trained and "pooler_output" in outputs:
        pooled.append(outputs.pooler_output)
    activations = _activations(outputs, pooled, inputs["attention_mask"] == 1)
    gradients: dict[str, np.ndarray] = {}
    if labels is not None:
        torch.nn.functional.cross_entropy(outputs.logits, torch.from_numpy(labels).long()).backward()
        gradients = {name: _numpy(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return Reference(
        inputs={name: np.asarray(inputs[name], np.int32) for name in INPUTS},
        activations=activations,
        weights=weights,
        made_with=f"torch {torch.__version__}, transformers {transformers.__version__}",
        labels=None if labels is None else np.asarray(labels, np.int32),
        gradients=gradients,
    )


def save(file: str | Path, reference: Reference) -> None:
    """Write a reference as safetensors, atomically. Raise a UserError if it cannot be written."""
    tensors = {f"inputs.{name}": value for name, value in reference.inputs.items()}
    tensors |= {f"activations.{name}": value for name, value in reference.activations.items()}
    tensors |= {f"gradients.{name}": value for name, value in reference.gradients.items()}
    if reference.labels is not None:
        tensors["labels"] = reference.labels
    metadata = {
        "format": _FORMAT,
        "weights": reference.weights,
        "made_with": reference.made_with,
        "activations": " ".join(reference.activations),  # safetensors does not keep their order
    }
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    storage.write_atomically(Path(file), to_bytes(contiguous, metadata=metadata))


def load(file: str | Path, directory: str | Path) -> Reference:
    """Load a reference for the checkpoint in `directory`.

    Raises:
      UserError: there is no such file, it is not a reference, or it was recorded from other weights.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; record one with --record on a machine with PyTorch")
    try:
        with safe_open(file, "np") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}); record it again") from error
    names = metadata.get("activations", "").split()
    required = {f"inputs.{name}" for name in INPUTS} | {f"activations.{name}" for name in names}
    if metadata.get("format") != _FORMAT or not required <= set(tensors):
        raise CheckpointError(f"{file}: not a reference in the format {_FORMAT}; record it again")
    if metadata["weights"] != fingerprint(directory):
        raise CheckpointError(
            f"{file} is stale: it was recorded from other weights than {directory} has; record it again"
        )

    def group(name: str) -> dict[str, np.ndarray]:
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    activations = group("activations")
    return Reference(
        inputs=group("inputs"),
        activations={name: activations[name] for name in names},
        weights=metadata["weights"],
        made_with=metadata["made_with"],
        labels=tensors.get("labels"),
        gradients=group("gradients"),
    )


def is_reference(file: str | Path) -> bool:
    """Return whether a file is a reference, for any checkpoint."""
    try:
        with safe_open(file, "np") as handle:
            return (handle.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError, ValueError):
        return False


def _check_pytorch_files(directory: str | Path) -> None:
    """Let PyTorch unpickle a file only if our own reader finds nothing but tensors in it."""
    for path in weight_files(directory):
        if path.suffix == ".bin":
            with PytorchFile(path):
                pass


@contextmanager
def _in_known_class(source: WeightSource) -> Iterator[Path]:
    """Yield the directory, or one with the same weights whose config.json names a class that `transformers` has."""
    directory, targets = source.directory, source.targets
    if source.family.saved_as in (None, source.family.name):
        yield directory
        return
    labels = class_names(directory, targets["head.kernel"].shape[0]) if "head.kernel" in targets else None
    with tempfile.TemporaryDirectory() as temporary:
        for file in {find_weights(directory), *weight_files(directory)}:
            (Path(temporary) / file.name).symlink_to(file.resolve())
        pooling, multi_label = read_pooling(directory), is_multi_label(directory)
        file = Path(temporary) / CONFIG
        write_config(file, read_config(directory), frozenset(targets), labels, pooling, multi_label=multi_label)
        yield Path(temporary)


def _load(directory: Path, architecture: str | None, family: Family, *, has_head: bool) -> tuple[Any, frozenset[str]]:
    """Return a model without dropout, and the names of its parameters that the checkpoint lacks."""
    import transformers

    if architecture is not None:
        return _from_pretrained(getattr(transformers, architecture), directory)
    if has_head:
        model, missing = _from_pretrained(transformers.AutoModelForSequenceClassification, directory)
        if not missing:
            return model, missing
    # Not every class that can have the encoder's pooler has it by default.
    options = {"add_pooling_layer": True} if family.pools_in_encoder else {}
    model, missing = _from_pretrained(transformers.AutoModel, directory, **options)
    untrained = sorted(name for name in missing if "pooler" not in name)  # transformers initialises them randomly
    if untrained:
        raise CheckpointError(
            f"{directory}: transformers does not find {', '.join(untrained[:3])} in it, so there is nothing to compare "
            "with"
        )
    return model, missing


def _from_pretrained(cls: Any, directory: Path, **options: Any) -> tuple[Any, frozenset[str]]:
    from transformers.utils import logging

    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it would warn about missing heads, which _load checks
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            os.fspath(directory.resolve()),
            use_safetensors=find_weights(directory).name in SAFETENSORS,
            local_files_only=True,
            trust_remote_code=False,
            dtype="float32",
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # several libraries raise their own exceptions for damaged files
        raise CheckpointError(f"{directory}: transformers cannot load it: {one_line(error, limit=300)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()
    return model.eval(), frozenset(info["missing_keys"])


def _last_layer_of_head(model: Any) -> Any:
    """Return the last linear layer of a classification head, or BERT's next-sentence layer, or None."""
    if hasattr(model, "classifier"):
        return getattr(model.classifier, "out_proj", model.classifier)
    return getattr(getattr(model, "cls", None), "seq_relationship", None)


def _activations(outputs: Any, pooled: list[Any], real: np.ndarray) -> dict[str, np.ndarray]:
    """Return a model's outputs under our names, without padding."""
    hidden = [_numpy(value)[real] for value in outputs.hidden_states]
    activations = {"embeddings": hidden[0]} | {f"layer_{i}": value for i, value in enumerate(hidden[1:], 1)}
    if pooled:
        vectors = _numpy(pooled[0])
        if vectors.ndim == 3:  # this head reads every token, and takes the mean of their logits
            vectors = np.stack([row[mask].mean(0) for row, mask in zip(vectors, real, strict=True)])
        activations["pooled"] = vectors
    if "logits" in outputs:
        logits = _numpy(outputs.logits)
        if logits.ndim == 3:  # of a masked language model, for every token
            activations["prediction_logits"] = logits[real]
        else:
            activations["logits"] = logits
    if "prediction_logits" in outputs:
        activations["prediction_logits"] = _numpy(outputs.prediction_logits)[real]
        activations["seq_relationship_logits"] = _numpy(outputs.seq_relationship_logits)
    return activations


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float32)
