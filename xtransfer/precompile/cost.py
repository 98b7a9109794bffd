"""The cost of a compiled program, from its own text: memory, estimated cycles, and collectives.

The TPU compiler writes an estimate of cycles beside most instructions. Their sum over everything that runs in order
(the entry computation, and loops as often as they run) depends on the program and the compiler alone, so it can compare
programs. It does not promise a time. Instructions without an estimate, such as embedding look-ups and transfers, are
counted separately.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from xtransfer.precompile.hlo import Instruction, Program, element_counts, size

GIB = 2**30

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that take no time of their own, or whose time is counted at the `-start` before them.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
        *("after-all", "while", "call", "conditional", "opt-barrier", "add-dependency"),
    )
)
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
_MATMULS = ("convolution", "dot")
_OOM = re.compile(r"([\d.]+)([KMGT]?)\) exceeds available|Used ([\d.]+)([KMGT]?) of \S+ hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip: arguments, temporary arrays, outputs in memory of their own, and the program itself."""

    arguments: int
    temporaries: int
    outputs: int
    code: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.arguments + self.temporaries + self.outputs + self.code


def memory(analysis: Any) -> Memory:
    """Return a program's memory from `Compiled.memory_analysis()`; an output in place of an argument costs nothing."""
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def needed_when_out_of_memory(message: str) -> int | None:
    """Return the bytes that a compiler wanted when it ran out of the chip's memory (HBM); None if it does not say."""
    found = _OOM.search(message)
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return round(float(number) * _UNITS[unit])


@dataclass(frozen=True)
class Cycles:
    """Estimated cycles of one run of a program on one chip.

    Attributes:
      total: over all instructions with an estimate.
      groups: cycles by purpose, the largest first; they sum to `total`.
      without: the number of instructions without an estimate, by kind; a loop counts each time.
      unknown_loops: the number of loops of unknown length, which `total` counts as if they ran once.
    """

    total: int
    groups: dict[str, int]
    without: dict[str, int]
    unknown_loops: int


def cycles(program: Program) -> Cycles:
    """Sum the compiler's estimates over everything that runs in order, and count what they leave out."""
    groups: Counter[str] = Counter()
    without: Counter[str] = Counter()
    trains = any("transpose(" in line.op_name for line, _ in program.run())
    unknown = 0
    for instruction, times in program.run():
        unknown += program.turns(instruction) is None
        if instruction.cycles is not None:
            groups[_group(program, instruction, trains)] += instruction.cycles * times
        elif kind := _unestimated(program, instruction):
            without[kind] += times
    return Cycles(sum(groups.values()), dict(groups.most_common()), dict(without.most_common()), unknown)


def _unestimated(program: Program, instruction: Instruction) -> str:
    """Return the kind of work of an instruction without an estimate, or "" if it is not worth counting."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or any(f'"{name}"' in instruction.line for name in _FREE_CALLS):
        return ""
    if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        return "copies in the background"
    if 'async_execution_thread="sparsecore"' in instruction.line:
        return "work of the sparse core"
    inside = {line.opcode for line in program.inside(instruction)}
    if any(one.removesuffix("-start") in _COLLECTIVES for one in inside):
        # Overlapped work is one fusion at its start and one at its end.
        return "" if instruction.name.startswith("async-collective-done") else "collectives"
    if all(elements <= 1 for elements in element_counts(instruction.result)):
        return ""
    if opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.line)
        return f"custom call {target[1] if target else ''}".strip()
    if inside & {"gather", "scatter"}:
        return "gather or scatter"
    return opcode


def _group(program: Program, instruction: Instruction, trains: bool) -> str:
    """Return what an instruction's cycles are spent on, such as "backward: dense matmul + dropout bits"."""
    inside = list(program.inside(instruction))
    source = instruction.op_name or next((line.op_name for line in reversed(inside) if line.op_name), "")
    found = {_kind(line, program.written_by(line), _phase(line.op_name, trains)) for line in inside}
    kinds = [kind for kind in _KINDS if kind in found]
    if not kinds:
        opcodes = {line.opcode for line in inside} - _MOVES
        own = source.rpartition("/")[2] or instruction.opcode
        kinds = [own if opcodes - {"convert"} else "casts" if opcodes else "copies and layout"]
    return f"{_phase(source, trains)}: {' + '.join(kinds)}"


def _phase(op_name: str, trains: bool) -> str:
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    if "jvp(" in op_name or not trains:
        return "forward"
    return "update" if op_name else "no source"


_KINDS = (
    *("attention matmul", "dense matmul", "kernel", "collective", "dropout bits", "softmax", "layer norm"),
    *("activation", "embedding", "accumulation", "optimizer"),
)
_MOVES = frozenset(
    (
        *("copy", "transpose", "bitcast", "reshape", "broadcast", "slice"),
        *("parameter", "constant", "tuple", "get-tuple-element"),
    )
)


def _kind(line: Instruction, functions: tuple[str, ...], phase: str) -> str:
    """Return the kind of work of one instruction, or "" for minor work that belongs to what it is fused with."""
    name = line.op_name
    if line.opcode in _MOVES:
        return ""
    if line.opcode in _MATMULS:
        return "attention matmul" if _has_batch_axis(name) else "dense matmul"
    if line.opcode == "custom-call" and "tpu_custom_call" in line.line:
        return "kernel"
    if line.opcode.removesuffix("-start") in _COLLECTIVES:
        return "collective"
    if re.search(r"threefry|bernoulli|random_bits|rng", f"{name} {line.opcode}"):
        return "dropout bits"
    if re.search(r"/(erfc?|tanh|logistic)$", name):
        return "activation"
    if name.endswith("/exp") and "log_softmax" not in name or "(softmax)" in name:
        return "softmax"
    if any(function.startswith("LayerNorm.") for function in functions):
        return "layer norm"
    if line.opcode in ("gather", "scatter") or any(function.startswith("Embed.") for function in functions):
        return "embedding"
    if phase == "update":
        return "accumulation" if "while/body" in name else "optimizer"
    return ""


def _has_batch_axis(op_name: str) -> bool:
    """Return whether a product by `einsum` has an axis in both factors and the result, as only activations do."""
    return any(set(a) & set(b) & set(c) for a, b, c in re.findall(r"(\w+),(\w+)->(\w+)", op_name))


def collectives(program: Program) -> dict[str, int]:
    """Return the bytes that one chip receives from each kind of collective in one run, the largest first.

    The bytes are those of the result: an all-reduce's reduced arrays, everything that an all-gather gathers, and the
    shard that a reduce-scatter leaves here. An asynchronous collective counts once, and in a loop each time.
    """
    found: dict[tuple[str, str], int] = {}
    for name, lines in program.computations.items():
        for line in lines:
            kind = line.opcode.removesuffix("-done")
            if kind not in _COLLECTIVES or not program.executions[name]:
                continue
            result = line.result
            if kind == "all-reduce" and "all-reduce-scatter" in name:  # the TPU compiler's form of a reduce-scatter
                kind, result = "reduce-scatter", lines[-1].result
            # An overlapped one is in several fusions with one channel, which others may share by chance.
            channel = re.search(r"channel_id=(\d+)", line.line) if "chain_id=" in line.line else None
            key = (kind, channel[1] if channel else f"{name} {line.name}")
            found[key] = max(found.get(key, 0), size(result) * program.executions[name])
    totals: Counter[str] = Counter()
    for (kind, _), amount in found.items():
        totals[kind] += amount
    return dict(totals.most_common())
