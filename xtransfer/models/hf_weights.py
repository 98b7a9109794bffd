"""Tensors of a Hugging Face directory: strict reading into a model's state, and writing it back.

Every tensor of the file matches exactly one rule of the family's table, every leaf of the model is filled, and only
declared heads may be new. Only safetensors is read, so nothing in a file is ever run.
"""

import logging
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xtransfer.errors import UserError
from xtransfer.models.hf_config import read_json
from xtransfer.models.weight_maps import TRANSPOSE, Family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")  # the half precisions are widened
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}

log = logging.getLogger(__name__)


def leaves(state: nnx.State) -> dict[str, Any]:
    """The variables of a state by dotted path."""
    return {dotted(path): variable for path, variable in nnx.to_flat_state(state)}


def dotted(path: Sequence[Any]) -> str:
    """A leaf's path as one name."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: name and shape as in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    transform: str

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """The numbers as a float32 leaf of this shape."""
        expected = shape[::-1] if self.transform == TRANSPOSE else shape
        if self.shape != expected:
            raise UserError(
                f"{self.file}: tensor {self.name} has shape {list(self.shape)}, the model of its config.json needs "
                f"{list(expected)}"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"{self.file}: tensor {self.name} has dtype {self.dtype}: one of {', '.join(DTYPES)}")
        try:
            with safe_open(self.file, "np") as handle:
                array = handle.get_tensor(self.name).astype(np.float32)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.file}: tensor {self.name} cannot be read ({error}): fetch it again") from error
        if not np.isfinite(array).all():
            raise UserError(f"{self.file}: tensor {self.name} has NaN or Inf: the checkpoint is broken")
        return np.ascontiguousarray(array.T) if self.transform == TRANSPOSE else array


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint by the leaf that they fill, and those that repeat another tensor."""

    directory: Path
    family: Family
    targets: dict[str, Tensor]
    copies: dict[str, Tensor]

    @classmethod
    def open(cls, directory: str | Path, family: Family) -> "Source":
        """Reads the names only. UserError: no safetensors, a broken file, a tensor without a rule, two for one leaf."""
        targets: dict[str, Tensor] = {}
        copies: dict[str, Tensor] = {}
        for file in _weight_files(Path(directory)):
            for name, dtype, shape in _tensors(file):
                source = family.canonical(name)
                if family.is_ignorable(source):
                    continue
                original = family.copy_of(source)
                found = family.target(original or source)
                if found is None:
                    raise UserError(
                        f"{file}: unknown tensor {name} {list(shape)}: not a plain {family.name} checkpoint"
                    )
                table = copies if original else targets
                if found[0] in table:
                    raise UserError(f"{file}: tensors {table[found[0]].name} and {name} are the same parameter")
                table[found[0]] = Tensor(file, name, dtype, shape, found[1])
        return cls(Path(directory), family, targets, copies)

    def fill(self, abstract: nnx.State, *, seed: int) -> nnx.State:
        """`abstract` with float32 numbers from the files; declared heads that they lack are drawn from `seed`.

        UserError: a missing or surplus tensor, a wrong shape (both are named), another dtype, NaN or Inf.
        """
        wanted = leaves(abstract)
        missing = {path for path in wanted if path not in self.targets}
        self._check_missing(missing)
        for path, tensor in self.targets.items():
            if path not in wanted and not self.family.is_head(path):
                raise UserError(
                    f"{tensor.file}: tensor {tensor.name} has no place in the model that its config.json describes"
                )
        if missing:
            log.info("%s: new, drawn from seed %d: %s", self.directory, seed, ", ".join(sorted(missing)))
        arrays = {
            path: _drawn(path, variable.shape, seed) if path in missing else self.targets[path].read(variable.shape)
            for path, variable in wanted.items()
        }
        for path, tensor in self.copies.items():
            if path in arrays and not np.array_equal(tensor.read(arrays[path].shape), arrays[path]):
                raise UserError(
                    f"{tensor.file}: tensor {tensor.name} differs from the one it is tied to: not supported"
                )
        flat = nnx.to_flat_state(abstract)
        return nnx.from_flat_state([(path, var.replace(jnp.asarray(arrays[dotted(path)]))) for path, var in flat])

    def _check_missing(self, missing: set[str]) -> None:
        """Declared heads may be missing whole; anything else is an error that names the tensor as the file would."""
        allowed: set[str] = set()
        for new in self.family.new:
            complete = not any(re.fullmatch(new.target, path) for path in self.targets)
            if complete and new.only_with:
                complete = not any(re.fullmatch(new.only_with, path) for path in self.targets)
            if complete:
                allowed |= {path for path in missing if re.fullmatch(new.target, path)}
        if wrong := sorted(missing - allowed):
            names = [self.family.source(path)[0] for path in wrong]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{self.directory}: the weights lack tensor {', '.join(names[:3])}{more}")


def _drawn(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A new leaf as BERT initialises it; depends on its path, its shape and the seed only."""
    if path.endswith("kernel"):
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    return np.full(shape, 1.0 if path.endswith("scale") else 0.0, np.float32)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise UserError(
            f"{directory}: no {WEIGHTS} (pickled weights such as pytorch_model.bin are never read: convert them "
            "with safetensors, or ask for a revision of the checkpoint that has them)"
        )
    table = read_json(index).get("weight_map")
    table = table if isinstance(table, dict) else {}
    names = sorted(set(table.values()), key=str)
    if not names or not all(isinstance(n, str) and re.fullmatch(r"[\w-]+\.safetensors", n) for n in names):
        raise UserError(f"{index}: weight_map has to map tensors to .safetensors files of this directory")
    files = [directory / name for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index}: {', '.join(absent)} missing")
    listed = {name for file in files for name, _, _ in _tensors(file)}
    if different := listed ^ set(table):
        raise UserError(f"{index}: tensor {min(different)} is in the index or in the files, not in both")
    return files


def _tensors(file: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    try:
        with safe_open(file, "np") as handle:
            slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
            return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}): fetch it again") from error


def write_weights(file: Path, params: nnx.State, family: Family, dtype: str = "float32") -> None:
    """Writes a state under the family's names in `dtype` (one of STORED): in float32 the inverse of `Source.fill`.

    UserError: a number that `dtype` cannot hold, or NaN or Inf.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, variable in leaves(params).items():
        name, transform = family.source(path)
        array = np.asarray(variable[...]).astype(STORED[dtype])
        if not np.isfinite(array).all():
            raise UserError(f"{file}: tensor {name} has NaN or Inf, or numbers beyond {dtype}: not saved")
        tensors[name] = np.ascontiguousarray(array.T) if transform == TRANSPOSE else array
    save_file(tensors, file, metadata={"format": "pt"})  # transformers refuses a file without this mark
