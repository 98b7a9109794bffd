"""Reading files of `torch.save` without PyTorch, and refusing whatever else they hold in bounded time and memory."""

import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.pytorch_files import (
    FALSE,
    ORDERED_DICT,
    call,
    dictionary,
    group,
    name,
    number,
    program,
    sizes,
    storage,
    tensor,
    text,
    write,
    write_tensors,
)
from xtransfer.errors import UserError
from xtransfer.models.hf.pytorch_file import PytorchFile

needs_pytorch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")

SIX = np.arange(6, dtype="<f4").tobytes()
FLOATS = storage("Float", "0", 6)
MATRIX = tensor(FLOATS, 0, (2, 3), (3, 1))
VALID = program(dictionary({"a": MATRIX}))


def read(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors, whole."""
    with PytorchFile(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: part[tuple(slice(0, size) for size in part.get_shape())] for key, part in slices.items()}


def assert_refused(path: Path, message: str | None = None) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    shown = str(caught.value)
    assert shown.startswith(f"{path}: ") and shown.isprintable() and len(shown) < len(str(path)) + 350
    assert time.monotonic() - start < 10


def test_numbers_shapes_and_dtypes_by_hand(tmp_path: Path) -> None:
    pickled = dictionary(
        {
            "matrix": MATRIX,
            "transposed": tensor(FLOATS, 0, (3, 2), (1, 3)),
            "second column": tensor(FLOATS, 1, (2,), (3,)),
            "parameter": call("torch._utils._rebuild_parameter", MATRIX, b"\x88", ORDERED_DICT),
            "empty": tensor(FLOATS, 6, (0, 3), (3, 1)),
            "scalar": tensor(storage("Long", "1", 2), 1, (), (), b"N"),
            "brain": tensor(storage("BFloat16", "2", 3), 0, (3,), (1,), b"}"),
            "half": tensor(storage("Half", "3", 1), 0, (1, 1), (7, 7)),
        }
    )
    # bfloat16 is the upper half of float32: 1.0 = 3f80, -2.0 = c000, 0.15625 = 3e20. float16 1.5 = 3e00.
    storages = {
        "0": SIX,
        "1": (7).to_bytes(8, "little") + (-8).to_bytes(8, "little", signed=True),
        "2": bytes.fromhex("803f 00c0 203e"),
        "3": bytes.fromhex("003e"),
    }
    path = write(tmp_path / "x.bin", program(pickled), storages)
    tensors = read(path)
    assert {key: value.tolist() for key, value in tensors.items()} == {
        "matrix": [[0, 1, 2], [3, 4, 5]],
        "transposed": [[0, 3], [1, 4], [2, 5]],
        "second column": [1, 4],
        "parameter": [[0, 1, 2], [3, 4, 5]],
        "empty": [],
        "scalar": -8,
        "brain": [1.0, -2.0, 0.15625],
        "half": [[1.5]],
    }
    assert tensors["empty"].shape == (0, 3)
    assert tensors["brain"].dtype == jnp.bfloat16
    with PytorchFile(path) as file:
        dtypes = [file.get_slice(key).get_dtype() for key in file.keys()]  # noqa: SIM118
        assert dtypes == ["F32", "F32", "F32", "F32", "F32", "I64", "BF16", "F16"]
        assert file.get_slice("transposed").get_shape() == [3, 2]
        assert file.get_slice("transposed")[1:3, 1:2].tolist() == [[4], [5]]
        with pytest.raises(ValueError, match="no tensor other"):
            file.get_slice("other")


def test_big_endian_storages_are_swapped_and_older_files_are_little_endian(tmp_path: Path) -> None:
    pickled = program(dictionary({"a": MATRIX, "b": tensor(storage("BFloat16", "1", 1), 0, (1,), (1,))}))
    big = {"0": np.arange(6, dtype=">f4").tobytes(), "1": bytes.fromhex("c000")}
    little = {"0": SIX, "1": bytes.fromhex("00c0")}
    for storages, order in ((big, b"big"), (little, b"little"), (little, None)):
        tensors = read(write(tmp_path / "x.bin", pickled, storages, byteorder=order))
        assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["b"].tolist() == [-2]
    assert_refused(write(tmp_path / "x.bin", pickled, little, byteorder=b"middle"), "byteorder is b'middle', neither")


def test_only_the_region_is_read(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x.bin", {"a": np.ones((4_000, 4_000), np.float32)})  # 64 MB
    tracemalloc.start()
    with PytorchFile(path) as file:
        assert file.get_slice("a")[3_990:, :4].sum() == 40
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_members_of_archives_beyond_4_gib_are_found(tmp_path: Path) -> None:
    """Their headers have an extra field with the sizes."""
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for member, data in (("my model/data.pkl", VALID), ("my model/data/0", SIX)):
            with archive.open(member, "w", force_zip64=True) as file:
                file.write(data)
    assert read(tmp_path / "x.bin")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@needs_pytorch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_pytorch_are_read_exactly(protocol: int, tmp_path: Path) -> None:
    import torch

    layer, grid = torch.nn.Linear(5, 3), torch.randn(6, 8, 4)
    state = layer.state_dict()  # an OrderedDict with _metadata
    state["tied"] = state["weight"]
    state["parameter"] = layer.bias
    state["transposed"] = grid.transpose(0, 2)
    state["view"] = grid[1:5:2, ::3, 1]
    state["empty"], state["scalar"] = torch.zeros(0, 3), torch.tensor(3.5)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        state[str(dtype)] = torch.randn(3, 4).to(dtype)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        state[str(dtype)] = torch.randint(0, 2, (7,)).to(dtype)
    torch.save(state, tmp_path / "x.bin", pickle_protocol=protocol)
    tensors = read(tmp_path / "x.bin")
    assert tensors.keys() == state.keys()
    for key, value in state.items():
        expected = value.detach()
        assert tensors[key].dtype.name == str(expected.dtype).removeprefix("torch.")
        expected = expected.float() if expected.dtype == torch.bfloat16 else expected
        np.testing.assert_array_equal(tensors[key].astype(expected.numpy().dtype), expected.numpy(), strict=True)


@needs_pytorch
def test_pytorch_reads_the_files_that_these_tests_write(tmp_path: Path) -> None:
    """If it did not, the tests by hand would be about another format."""
    import torch

    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asarray([1, -2], np.int64)}
    loaded = torch.load(write_tensors(tmp_path / "x.bin", tensors), weights_only=True)
    assert {key: value.tolist() for key, value in loaded.items()} == {"a": [[0, 1, 2], [3, 4, 5]], "b": [1, -2]}


class Payload:
    """An object that creates a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Chain:
    """An object whose unpickling calls one function on the result of another."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Payload, (Payload(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", [Payload, Chain])
def test_nothing_is_executed(kind: Any, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickled = pickle.dumps({"a": kind(marker)}, protocol)
    assert_refused(write(tmp_path / "x.bin", pickled), "names '|opcode [A-Z_]+, which no dictionary")
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()


NESTED = b")" + b"\x85" * 100_000
DOUBLED = b")" + b"q\x00h\x00\x86" * 200  # a tuple with 2^200 leaves


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (name("os.system") + group(text("exit")) + b"R", r"names 'os\.system', which is not needed for tensors"),
        (call("builtins.eval", text("1")), r"names 'builtins\.eval'"),
        (call("builtins.getattr", text("1")), r"names 'builtins\.getattr'"),
        (name("torch.load"), r"names 'torch\.load'"),
        (name("torch.ComplexFloatStorage"), r"names 'torch\.ComplexFloatStorage'"),
        (name("torch.FloatStorage.__init__"), r"names 'torch\.FloatStorage\.__init__'"),
        (b"ctorch FloatStorage\n\n", r"names 'torch\.FloatStorage "),
        (text("system") + b"q\x01" + text("os") + b"q\x00h\x00h\x01\x93", r"names 'os\.system'"),
        (text("torch") + b"\x94)\x94h\x00h\x01\x93", "names 'a tuple'"),
        (text("os") + text("system\x1b[0m") + b"\x93", r"names 'os\.system\\x1b"),
        (b"(" + text("exit") + b"ios\nsystem\n", "the opcode INST"),
        (b"(" + name("collections.OrderedDict") + b"o", "the opcode OBJ"),
        (name("collections.OrderedDict") + b")\x81", "the opcode NEWOBJ"),
        (name("collections.OrderedDict") + b")}\x92", "the opcode NEWOBJ_EX"),
        (b"\x82\x01", "the opcode EXT1"),
        (b"\x83\x01\x00", "the opcode EXT2"),
        (b"\x84\x01\x00\x00\x00", "the opcode EXT4"),
        (ORDERED_DICT + b"}" + text("__setstate__") + name("collections.OrderedDict") + b"sb", "sets the attributes"),
        (MATRIX + b"}" + text("_metadata") + b"Nsb", "sets the attributes of a tensor"),
        (name("collections.OrderedDict") + b"}b", "sets the attributes of a name"),
        (b"}Nb", "sets the attributes of a dictionary"),
        (b"Pstorage\n", "the opcode PERSID"),
        (text("storage") + b"Q", "something other than a storage"),
        (
            group(text("module"), name("torch.FloatStorage"), text("0"), text("cpu"), number(6)) + b"Q",
            "other than a st",
        ),
        (group(text("storage"), text("torch.FloatStorage"), text("0"), text("cpu"), number(6)) + b"Q", "other than a"),
        (storage("Float", "../0", 6), "something other than a storage"),
        (storage("Float", "0", -1), "something other than a storage"),
        (storage("Float", "0", 1 << 1000), "something other than a storage"),
        (call("collections.OrderedDict", group(group(text("a"), MATRIX))), r"calls 'collections\.OrderedDict' with ot"),
        (call("torch.FloatStorage", number(1 << 40)), r"calls 'torch\.FloatStorage' with other arguments"),
        (name("torch._utils._rebuild_parameter") + b"NR", "calls 'torch._utils._rebuild_parameter' with other arg"),
        (call("torch._utils._rebuild_parameter", b"}", FALSE, ORDERED_DICT), "_rebuild_parameter' with other arg"),
        (call("torch._utils._rebuild_tensor_v2", FLOATS), "_rebuild_tensor_v2' with other arguments"),
        (tensor(FLOATS, 0, (2, 3), (3, 1), b"}" + text("conj") + b"\x88s"), "_rebuild_tensor_v2' with other"),
        (b"NNR", "calls None with other arguments"),
        (b"))R", "calls a tuple with other arguments"),
        (b"]", "the opcode EMPTY_LIST"),
        (b"C\x01x", "the opcode SHORT_BINBYTES"),
        (b"NN2", "the opcode DUP"),
        (b"N0", "the opcode POP"),
        (b"I1\n", "the opcode INT"),
        (b"\x8b\xff\xff\xff\x7f", "is not a whole pickle .not enough data in stream to read long4"),
        (b"X\xff\xff\xff\xff", "is not a whole pickle .expected 4294967295 bytes in a u"),
        (b"\x8d" + b"\xff" * 8 + b"x", "is not a whole pickle"),
        (b"h\x05", "reads memo 5, which is empty"),
        (b"R", "takes more values than it has"),
        (b"t", "takes more values than it has"),
        (b"(R", "takes more values than it has"),
        (b"N(", "takes more values than it has"),
        (b"NN", "ends with unused values"),
        (b"(N", "ends with unused values"),
        (b"N", "holds None, not a dictionary of tensors"),
        (MATRIX, "holds a tensor, not a dictionary of tensors"),
        (NESTED, "holds a tuple, not a dictionary of tensors"),
        (DOUBLED, "holds a tuple, not a dictionary of tensors"),
        (b"(" * 100_000, "takes more values than it has"),
        (b"}" + NESTED + b"Ns", "has a tuple as a key"),
        (b"}" + DOUBLED + b"Ns", "has a tuple as a key"),
        (b"}" + NESTED + b"b", "sets the attributes"),
        (b"}NNs", "has None as a key"),
        (dictionary({"optimizer": dictionary({"state": b"}" + number(0) + b"Ns"})}), "has a number as a key"),
        (b"}(Nu", "puts items into a dictionary"),
        (b"N(NNu", "puts items into None"),
        (dictionary({"a": DOUBLED}), "holds a tuple under 'a', where a tensor is expected"),
        (dictionary({"a": FLOATS}), "holds a storage under 'a'"),
        (dictionary({"a": name("torch.FloatStorage")}), "holds a name under 'a'"),
        (
            dictionary({"epoch": number(3), "state_dict": dictionary({"a": MATRIX})}),
            "the first keys are 'epoch', 'state_dict'\\): download it again, or save the model's state_dict alone",
        ),
        (b"}q\x00" + text("a") + b"h\x00s", "holds a dictionary under 'a'"),
        (ORDERED_DICT + (text("a") + MATRIX + b"s") * 2, "has the key 'a' twice"),
        (dictionary({"a\nb": MATRIX}), r"tensor 'a\\nb' is not printable"),
        (dictionary({"a\ud800": MATRIX}), r"tensor 'a\\ud800' is not printable"),
        (b"\x88" * 1_000_001, "over 1000000 opcodes"),
        (b"}q\x00" + b"h\x00" * 1_000_001, "over 1000000 opcodes"),
        (b"}" + b"".join(text(str(i)) + b"Ns" for i in range(350_000)), "more than any model needs"),
        (text("x" * (1 << 22)), "more than any model needs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "program",
)
def test_programs_that_describe_no_tensors_are_refused(value: bytes, message: str, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "x.bin", program(value), {"0": SIX}), message)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            tensor(FLOATS, 1, (2, 3), (3, 1)),
            r"shape \[2, 3\] at 1 with strides \[3, 1\], beyond the 6 numbers of data/0",
        ),
        (tensor(FLOATS, 7, (0,), (1,)), r"shape \[0\] at 7"),
        (tensor(FLOATS, 6, (), ()), r"shape \[\] at 6"),
        (tensor(FLOATS, 0, (7,), (1,)), "beyond the 6 numbers"),
        (tensor(FLOATS, 0, (2,), (6,)), "beyond the 6 numbers"),
        (tensor(FLOATS, 0, (2,), (1 << 62,)), "beyond the 6 numbers"),
        (tensor(FLOATS, 0, (0, 1 << 62, 1 << 62), (1, 1, 1)), "beyond the 6 numbers"),
        (tensor(FLOATS, 0, (1 << 61,), (0,)), r"with overlapping strides \[0\]"),
        (tensor(FLOATS, 0, (2, 3), (0, 1)), r"with overlapping strides \[0, 1\]"),
        (tensor(FLOATS, 0, (3, 3), (1, 1)), r"with overlapping strides \[1, 1\]"),
        (tensor(FLOATS, 0, (2, 3), (2, 1)), r"with overlapping strides \[2, 1\]"),
        (tensor(FLOATS, 5, (2,), (-1,)), "are not sizes"),
        (tensor(FLOATS, -1, (2,), (1,)), "are not sizes"),
        (tensor(FLOATS, 0, (-2,), (1,)), "are not sizes"),
        (tensor(FLOATS, 0, (1 << 63,), (0,)), "are not sizes"),
        (tensor(FLOATS, 0, (1,) * 33, (1,) * 33), "without a storage, a shape, or strides"),
        (tensor(FLOATS, 0, (2, 3), (1,)), "without a storage, a shape, or strides"),
        (tensor(b"N", 0, (2, 3), (3, 1)), "without a storage, a shape, or strides"),
        (tensor(storage("Float", "0", 7), 0, (2, 3), (3, 1)), "member data/0 has 24 bytes, its data.pkl needs 28"),
        (tensor(storage("Float", "0", 1 << 60), 0, (1 << 60,), (1,)), "member data/0 has 24 bytes, its data.pkl needs"),
        (tensor(storage("Double", "0", 6), 0, (6,), (1,)), "member data/0 has 24 bytes, its data.pkl needs 48"),
        (tensor(storage("Float", "1", 6), 0, (6,), (1,)), "member data/1 is missing"),
        (
            call("torch._utils._rebuild_tensor_v2", FLOATS, b"\x88", sizes([2]), sizes([1]), FALSE, ORDERED_DICT),
            "are not sizes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "tensor",
)
def test_tensors_outside_their_storage_are_refused(described: bytes, message: str, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "x.bin", program(dictionary({"a": described})), {"0": SIX}), message)


def test_a_storage_described_twice_must_be_the_same(tmp_path: Path) -> None:
    both = {"a": MATRIX, "b": tensor(storage("Int", "0", 6), 0, (6,), (1,))}
    assert_refused(write(tmp_path / "x.bin", program(dictionary(both)), {"0": SIX}), "describes data/0 in two ways")


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that occur twice
        for member, data in members:
            archive.writestr(member, data)
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a/data.pkl", VALID), ("a/data/0", SIX), ("a/data.pkl", VALID)], "member 'a/data.pkl' occurs twice"),
        ([("a/data.pkl", VALID), ("a/data/0", SIX), ("a/data/0", SIX)], "member 'a/data/0' occurs twice"),
        ([("a/data.pkl", VALID), ("b/data/0", SIX)], "member 'b/data/0' is not in its folder 'a'"),
        ([("a/data.pkl", VALID), ("../data/0", SIX)], "member '../data/0' is not in its folder 'a'"),
        ([("a/data.pkl", VALID), ("a/data/../0", SIX)], "member 'a/data/../0' is not in its folder"),
        ([("../data.pkl", VALID), ("../data/0", SIX)], "is not in its folder '..'"),
        ([("/data.pkl", VALID), ("/data/0", SIX)], "is not in its folder ''"),
        ([("a/data.pkl", VALID), ("a/data\\0", SIX)], r"member 'a/data\\\\0' is not in its folder"),
        ([("data.pkl", VALID), ("data/0", SIX)], "is not in its folder 'data.pkl'"),
        ([("a/data.pkl", VALID)], "member data/0 is missing"),
        ([("a/data/0", SIX)], "member data.pkl is missing"),
        ([("a/data.pkl", VALID), ("a/data/0", SIX), ("a/constants.pkl", b"")], "a TorchScript program"),
    ],
)
def test_zips_of_another_shape_are_refused(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    assert_refused(zipped(tmp_path / "x.bin", members), message)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    members = [("a/data.pkl", VALID), ("a/data/0", SIX)]
    assert_refused(zipped(tmp_path / "x.bin", members, zipfile.ZIP_DEFLATED), "data.pkl is compressed or encrypted")


def edit(path: Path, change: Callable[[bytearray], Any]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.__setitem__(6, b[6] | 1), "data.pkl is compressed or encrypted"),
        (lambda b: b.__setitem__(8, 8), "data.pkl is compressed or encrypted"),
        (lambda b: b.__setitem__(30, b[30] ^ 1), "data.pkl has another name or none at its place"),
        (lambda b: b.__setitem__(slice(28, 30), b"\xff\xff"), "data.pkl lies outside the file"),
        (lambda b: b.__setitem__(slice(-10, -6), b"\xff\xff\xff\x7f"), "."),  # the size of the list of members
        (lambda b: b.__setitem__(slice(b.rindex(b"PK\1\2") + 42, b.rindex(b"PK\1\2") + 46), b"\xff\xff\xff\x7f"), "."),
        (lambda b: b.insert(0, 0), "not a zip file, as PyTorch 1.6 and later write"),
        (lambda b: b.__delitem__(slice(-30, None)), "not a zip file"),
        (lambda b: b.__delitem__(slice(100, 200)), "."),
    ],
)
def test_damaged_zips_are_refused(change: Callable[[bytearray], Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", VALID)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", SIX)
    read(path)
    assert_refused(edit(path, change), message)


def test_every_wrong_bit_in_the_pickle_is_refused(tmp_path: Path) -> None:
    """The checksum shows it, also if the program is still a valid one."""
    pickled = program(dictionary({"a": MATRIX, "b": tensor(storage("Float", "1", 6), 0, (2, 3), (3, 1))}))
    path = write(tmp_path / "x.bin", pickled, {"0": SIX, "1": bytes(24)})
    content = path.read_bytes()
    start = content.index(pickled)
    for place in range(start, start + len(pickled)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert_refused(path, "data.pkl does not have the checksum that the zip gives for it")


@needs_pytorch
def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    import torch

    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "x.bin")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_list_of_members_beyond_any_models_is_not_read(tmp_path: Path) -> None:
    members = [(f"a/{'x' * 60_000}{index}", b"") for index in range(70)]  # names of 4.2 MB
    assert_refused(zipped(tmp_path / "x.bin", members), "its list of members has 42[0-9]{5} bytes, more than any model")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "x.bin", VALID, {"0": SIX}).read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut.bin").write_bytes(content[:size])
        assert_refused(tmp_path / "cut.bin")


def test_older_formats_are_refused(tmp_path: Path) -> None:
    path, buffer = tmp_path / "x.bin", io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    for content in (b"", VALID, buffer.getvalue(), pickle.dumps(0x1950A86A20F9469CFC6C, 2) + VALID):
        path.write_bytes(content)
        assert_refused(path, "it is not a zip file, as PyTorch 1.6 and later write: download it again, or save the")


def test_missing_file_and_directory_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x.bin"):
        with pytest.raises(UserError, match="No such file|Is a directory"):
            PytorchFile(path)


BOMBS = """
import io, resource, sys, time, zipfile
from pathlib import Path
from tests.helpers.pytorch_files import program, text, write
from xtransfer.errors import UserError
from xtransfer.models.hf.pytorch_file import PytorchFile

directory = Path(sys.argv[1])
with zipfile.ZipFile(directory / "compressed.bin", "w", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("a/data.pkl", "w") as member:
        for _ in range(512):
            member.write(bytes(1 << 20))
programs = {
    "memo": b"Nr\\xff\\xff\\xff\\xff",
    "text": b"\\x8d\\0\\0\\0\\0\\x10\\0\\0\\0",
    "bytes": b"\\x8e\\0\\0\\0\\0\\x10\\0\\0\\0",
    "frame": b"\\x95\\0\\0\\0\\0\\x10\\0\\0\\0",
    "dictionaries": b"}" * 1_000_001,
    "marks": b"(" * 1_000_001,
    "digits": b"L" + b"9" * 1_000_000 + b"L\\n",
    "nested": b")" + b"\\x85" * 999_000 + b"N",
    "reread": text("x" * 4_000_000) + b"q\\0" + b"h\\0" * 90_000,
}
for name, value in programs.items():
    write(directory / f"{name}.bin", program(value))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), used + (256 << 20)))
start = time.monotonic()
for path in sorted(directory.glob("*.bin")):
    try:
        PytorchFile(path)
    except UserError as error:
        print(path.name, str(error).splitlines() == [str(error)])
print("seconds", time.monotonic() - start < 30)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_bombs_are_refused_within_bounded_memory_and_time(tmp_path: Path) -> None:
    """A process that may use 256 MiB more reads files that ask for gigabytes."""
    command = [sys.executable, "-c", BOMBS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    files = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert len(files) == 10
    assert result.stdout.splitlines() == [*(f"{file} True" for file in files), "seconds True"], result.stderr[-500:]


@given(st.binary(max_size=300))
def test_random_programs_raise_only_user_errors(tmp_path_factory: pytest.TempPathFactory, pickled: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.bin"
    for content in (pickled, b"\x80\x02" + pickled + b".", b"}" + pickled):
        attempt(write(path, content, {"0": SIX}))


FULL = program(
    dictionary({"a": MATRIX, "b": call("torch._utils._rebuild_parameter", MATRIX, b"\x88", ORDERED_DICT)})
    + b"}"
    + text("_metadata")
    + ORDERED_DICT
    + b"sb"
)
MUTATIONS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("=+-x"), st.binary(max_size=3)), max_size=4)


def mutate(content: bytes, mutations: list[tuple[int, str, bytes]]) -> bytes:
    """Replace, insert, delete, or repeat bytes at some places."""
    for place, kind, new in mutations:
        at = place % (len(content) + 1)
        end = at + len(new)
        middle = {"=": new, "+": new + content[at:end], "-": b"", "x": content[at:end] * 2}[kind]
        content = content[:at] + middle + content[end:]
    return content


def attempt(path: Path) -> None:
    """Read a file, which may only raise a UserError of one line."""
    try:
        read(path)
    except UserError as error:
        assert str(error).isprintable()


@given(MUTATIONS)
def test_mutated_programs_raise_only_user_errors(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[int, str, bytes]]
) -> None:
    attempt(write(tmp_path_factory.getbasetemp() / "mutated.bin", mutate(FULL, mutations), {"0": SIX}))


@given(MUTATIONS)
def test_mutated_files_raise_only_user_errors(
    tmp_path_factory: pytest.TempPathFactory, mutations: list[tuple[int, str, bytes]]
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "file.bin", FULL, {"0": SIX})
    path.write_bytes(mutate(path.read_bytes(), mutations))
    attempt(path)
