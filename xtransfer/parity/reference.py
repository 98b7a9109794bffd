"""What the original computes: activations of a checkpoint by PyTorch and `transformers`, live or from a file.

The only module that imports PyTorch or a model of `transformers`, inside its functions: nothing else needs them.
A reference is kept as safetensors, so that a machine without PyTorch can hold our encoder against it.
Names: `embeddings` is what enters the first layer, `layer_1` … what each layer gives, `pooled` what the last linear
layer of the head reads (of BERT also without a head: the pooler's output), `logits` what it gives.
"""

import hashlib
import importlib.util
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from xtransfer import storage
from xtransfer.errors import UserError, one_line
from xtransfer.models.hf.config import read_config
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import weight_files

FILE = "reference.safetensors"  # its name beside a checkpoint
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_FORMAT = "xtransfer-reference-1"


@dataclass(frozen=True, eq=False)
class Reference:
    """What was computed from what. N examples of up to S tokens, T tokens in all, H hidden size, K classes.

    Attributes:
      inputs: input_ids, attention_mask, token_type_ids, each [N, S] int32; padding is at the end of a row.
      activations: float32 by name, in the order of computation: embeddings, layer_1 … [T, H], the tokens that are not
        padding row by row; pooled [N, H] and logits [N, K] where the checkpoint has what computes them. Of a
        BertForPreTraining also prediction_logits [T, V] and seq_relationship_logits [N, 2].
      weights: sha256 of the weights, see `fingerprint`.
      made_with: the versions that computed it.
      labels: [N] int32, or None.
      gradients: of the mean cross-entropy of labels, float32 by the tensor's name in the file and with its shape.
    """

    inputs: Mapping[str, np.ndarray]
    activations: Mapping[str, np.ndarray]
    weights: str
    made_with: str
    labels: np.ndarray | None = None
    gradients: Mapping[str, np.ndarray] = field(default_factory=dict)


def available() -> bool:
    """Whether PyTorch is installed, so that `compute` works."""
    return importlib.util.find_spec("torch") is not None


def fingerprint(directory: str | Path) -> str:
    """sha256 over the bytes of a checkpoint's safetensors files, shards in the order of their names."""
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
    """Runs a checkpoint in `transformers`: float32, no dropout.

    Args:
      directory: of the checkpoint; only safetensors is read and no code from it is run.
      inputs: see `Reference.inputs`; token types are left out where the model has none.
      labels: [N] classes; with them also the gradients (the checkpoint needs a classification head then).
      architecture: a class of `transformers`; None takes the sequence classifier where its head is in the file, else
        the bare encoder.

    Raises:
      UserError: PyTorch is not installed, or `transformers` cannot load the checkpoint whole.
    """
    if not available():
        raise UserError("PyTorch is not installed: install torch, or give a reference that a machine with it recorded")
    import torch
    import transformers

    weights = fingerprint(directory)  # first: it says in our words where there are no safetensors
    model, absent = _load(Path(directory), architecture)
    accepted = inspect.signature(model.forward).parameters
    arguments = {name: torch.from_numpy(inputs[name]).long() for name in INPUTS if name in accepted}
    seen: list[Any] = []
    if (reader := _reader_of_pooled(model)) is not None:
        reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.set_grad_enabled(labels is not None):
        outputs = model(**arguments, output_hidden_states=True)
    # The poolers of other families' bare encoders are trained by nothing and read by no head.
    family = FAMILIES[read_config(directory).family]
    if not seen and family.pools_in_encoder and not any("pooler" in name for name in absent):
        seen.append(outputs.pooler_output)
    activations = _activations(outputs, seen, inputs["attention_mask"] == 1)
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
    """Writes a reference as safetensors, whole or not at all; UserError where it cannot be written."""
    tensors = {f"inputs.{name}": value for name, value in reference.inputs.items()}
    tensors |= {f"activations.{name}": value for name, value in reference.activations.items()}
    tensors |= {f"gradients.{name}": value for name, value in reference.gradients.items()}
    if reference.labels is not None:
        tensors["labels"] = reference.labels
    metadata = {
        "format": _FORMAT,
        "weights": reference.weights,
        "made_with": reference.made_with,
        "activations": " ".join(reference.activations),  # safetensors keeps no order
    }
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    storage.write_atomically(Path(file), to_bytes(contiguous, metadata=metadata))


def load(file: str | Path, directory: str | Path) -> Reference:
    """Reads a reference of the checkpoint in `directory`.

    UserError: there is no such file, it is no reference, or it was recorded from other weights.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file: record it with --record where PyTorch is installed")
    try:
        with safe_open(file, "np") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}): record it again") from error
    names = metadata.get("activations", "").split()
    wanted = {f"inputs.{name}" for name in INPUTS} | {f"activations.{name}" for name in names}
    if metadata.get("format") != _FORMAT or not wanted <= set(tensors):
        raise UserError(f"{file}: not a reference of {_FORMAT}: record it again")
    if metadata["weights"] != fingerprint(directory):
        raise UserError(f"{file}: stale: recorded from other weights than those in {directory}: record it again")

    def part(name: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

    activations = part("activations")
    return Reference(
        inputs=part("inputs"),
        activations={name: activations[name] for name in names},
        weights=metadata["weights"],
        made_with=metadata["made_with"],
        labels=tensors.get("labels"),
        gradients=part("gradients"),
    )


def is_reference(file: str | Path) -> bool:
    """Whether a file is a reference, of any checkpoint."""
    try:
        with safe_open(file, "np") as handle:
            return (handle.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError, ValueError):
        return False


def _load(directory: Path, architecture: str | None) -> tuple[Any, frozenset[str]]:
    """(model without dropout, names of its parameters that the file lacks)."""
    import transformers

    if architecture is not None:
        return _from_pretrained(getattr(transformers, architecture), directory)
    model, absent = _from_pretrained(transformers.AutoModelForSequenceClassification, directory)
    if absent:
        model, absent = _from_pretrained(transformers.AutoModel, directory)
    if lost := sorted(name for name in absent if "pooler" not in name):  # they are random in the model
        raise UserError(f"{directory}: transformers does not find {', '.join(lost[:3])} in it: nothing to compare with")
    return model, absent


def _from_pretrained(cls: Any, directory: Path) -> tuple[Any, frozenset[str]]:
    from transformers.utils import logging

    shown, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it warns of the heads that a checkpoint lacks, which is looked at here
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            os.fspath(directory.resolve()),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype="float32",
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # whatever is wrong with the files, in the words of several libraries
        raise UserError(f"{directory}: transformers cannot load it: {one_line(error, limit=300)}") from error
    finally:
        logging.set_verbosity(shown)
        if bar:
            logging.enable_progress_bar()
    return model.eval(), frozenset(info["missing_keys"])


def _reader_of_pooled(model: Any) -> Any:
    """The last linear layer of a classification head, or BERT's next-sentence layer; None where there is neither."""
    if hasattr(model, "classifier"):
        return getattr(model.classifier, "out_proj", model.classifier)
    return getattr(getattr(model, "cls", None), "seq_relationship", None)


def _activations(outputs: Any, pooled: list[Any], real: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of a model under our names, without padding."""
    hidden = [_numpy(value)[real] for value in outputs.hidden_states]
    found = {"embeddings": hidden[0]} | {f"layer_{i}": value for i, value in enumerate(hidden[1:], 1)}
    if pooled:
        found["pooled"] = _numpy(pooled[0])
    if "logits" in outputs:
        found["logits"] = _numpy(outputs.logits)
    if "prediction_logits" in outputs:
        found["prediction_logits"] = _numpy(outputs.prediction_logits)[real]
        found["seq_relationship_logits"] = _numpy(outputs.seq_relationship_logits)
    return found


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float32)
