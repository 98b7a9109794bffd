"""Files as `torch.save` writes them, made without PyTorch: a pickle, opcode by opcode, and storages in a zip."""

import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

KINDS = {
    np.dtype(np.float64): "Double",
    np.dtype(np.float32): "Float",
    np.dtype(np.float16): "Half",
    np.dtype(jnp.bfloat16): "BFloat16",
    np.dtype(np.int64): "Long",
    np.dtype(np.int32): "Int",
    np.dtype(np.int16): "Short",
    np.dtype(np.int8): "Char",
    np.dtype(np.uint8): "Byte",
    np.dtype(np.bool_): "Bool",
}


def text(value: str) -> bytes:
    """Return the opcode of a text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Return the opcode of an integer of up to 254 bytes."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def group(*items: bytes) -> bytes:
    """Return the opcodes of a tuple."""
    return b"(" + b"".join(items) + b"t"


def sizes(values: Sequence[int]) -> bytes:
    """Return the opcodes of a tuple of integers."""
    return group(*map(number, values))


def name(dotted: str) -> bytes:
    """Return the opcode that imports a name."""
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function: str, *arguments: bytes) -> bytes:
    """Return the opcodes of the call of a name."""
    return name(function) + group(*arguments) + b"R"


ORDERED_DICT = name("collections.OrderedDict") + b")R"
FALSE = b"\x89"


def storage(kind: str, key: str, length: int) -> bytes:
    """Return the opcodes of a reference to a storage, such as Float, by its key."""
    names = (text("storage"), name(f"torch.{kind}Storage"), text(key), text("cpu"))
    return group(*names, number(length)) + b"Q"


def tensor(of: bytes, offset: int, shape: Sequence[int], strides: Sequence[int], *more: bytes) -> bytes:
    """Return the opcodes of a tensor in a storage; `more` are its metadata."""
    place = (of, number(offset), sizes(shape), sizes(strides))
    return call("torch._utils._rebuild_tensor_v2", *place, FALSE, ORDERED_DICT, *more)


def dictionary(items: Mapping[str, bytes]) -> bytes:
    """Return the opcodes of an OrderedDict."""
    return ORDERED_DICT + b"(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def program(value: bytes) -> bytes:
    """Return the pickle of a value."""
    return b"\x80\x02" + value + b"."


def write(
    path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, *, byteorder: bytes | None = b"little"
) -> Path:
    """Write the zip and return its path."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        if byteorder is not None:
            archive.writestr("archive/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Write arrays, each with a storage of its own, as a model's state_dict with its `_metadata`."""
    items, storages = {}, {}
    for index, (key, array) in enumerate(tensors.items()):
        strides = [stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides]
        items[key] = tensor(storage(KINDS[array.dtype], str(index), array.size), 0, array.shape, strides)
        storages[str(index)] = array.tobytes()
    metadata = b"}" + text("_metadata") + dictionary({"": b"}" + text("version") + number(1) + b"s"}) + b"s"
    return write(path, program(dictionary(items) + metadata + b"b"), storages)
