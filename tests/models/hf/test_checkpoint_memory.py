"""Peak memory of reading a checkpoint, measured in separate processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures.record import FIXTURES
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import leaves

MEASURE = """
import gc, json, sys, threading
from xtransfer.models.hf import checkpoint as hf_checkpoint, config as hf_config, weights as hf_weights
from xtransfer.runtime import sharding

placed, excess, done = 0, 0, threading.Event()

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) * 1024

def counting_placed(read, shape, layout, place=hf_weights._placed):
    places = [None] if layout is None else [*layout.addressable_devices_indices_map(shape).values()]

    def counting_read(index):
        global placed
        part = read(index)
        placed += part.nbytes * len(places) // len(set(map(str, places)))
        return part

    return place(counting_read, shape, layout)

def watch():
    global excess
    while not done.wait(0.0005):
        before = placed  # bytes of parameters that are on a device, or on their way there
        used = anonymous() - start - before
        excess = max(excess, used) if before == placed else excess

hf_weights._placed = counting_placed
mesh = sharding.make_mesh(tuple(map(int, sys.argv[2].split(",")))) if sys.argv[2] else None
gc.collect()
start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
params = hf_checkpoint.load_classifier(sys.argv[1], 3, seed=0, mesh=mesh)[1]
done.set()
thread.join()
print(json.dumps({"excess": excess, "placed": placed}))
"""


def sparse_checkpoint(directory: Path, dtype: str, **sizes: int) -> int:
    """Write a classifier of zeros as a sparse file, and return the bytes of its largest leaf."""
    config = replace(hf_config.read_config(FIXTURES / "bert_classifier"), **sizes)
    _, state = hf_checkpoint.abstract_classifier(config, 3)
    directory.mkdir()
    hf_config.write_config(directory / "config.json", config, frozenset(leaves(state)), tuple("abc"), "cls")
    header, end = {}, 0
    for path, variable in leaves(state).items():
        name, layout = FAMILIES["bert"].source(path)
        begin, end = end, end + variable.size * (4 if dtype == "F32" else 2)
        shape = variable.shape[::-1] if layout.transposed else variable.shape
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return 4 * max(variable.size for variable in leaves(state).values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_reading_needs_memory_for_the_parameters_and_little_more_than_one_tensor(dtype: str, tmp_path: Path) -> None:
    # The largest tensor, a kernel of 105 MB, is transposed while it is read. Each of eight devices reads its own part.
    sizes = {"hidden_size": 1024, "num_heads": 16, "num_layers": 1, "intermediate_size": 25_600, "vocab_size": 1000}
    largest = sparse_checkpoint(tmp_path / "large", dtype, **sizes)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large")]
    children = [subprocess.Popen([*command, mesh], stdout=subprocess.PIPE) for mesh in ("", "1,4,2")]
    single, sharded = (json.loads(child.communicate(timeout=120)[0]) for child in children)
    print(dtype, largest, single, sharded)
    assert single["placed"] > 2 * largest and 0.5 * largest < single["excess"] < 1.3 * largest
    assert sharded["placed"] > 2 * largest and sharded["excess"] < 0.5 * largest
