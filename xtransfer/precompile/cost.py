"""Read the cost of a compiled program from its own text: memory, estimated cycles, and collectives.

The TPU compiler writes an estimate of cycles beside most instructions. Their sum over everything that runs (each loop
body as often as it runs) depends on the program and the compiler alone, so it can compare programs. It does not promise
a time. Instructions without an estimate, such as embedding look-ups and transfers, are counted separately.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from xtransfer.precompile.hlo import Instruction, Program, element_counts, num_bytes

GIB = 2**30

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that take no time of their own.
_FREE = frozenset(
    (
        "add-dependency",
        "after-all",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    )
)
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
_MATMULS = ("convolution", "dot")
_OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMGT]?)\) exceeds available|Used ([\d.]+)([KMGT]?) of \S+ hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      arguments: the arguments.
      temporaries: temporary arrays.
      outputs: outputs that do not reuse an argument's memory.
      code: the program itself.
    """

    arguments: int
    temporaries: int
    outputs: int
    code: int

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return self.arguments + self.temporaries + self.outputs + self.code


def memory(analysis: Any) -> Memory:
    """Return a program's memory from `Compiled.memory_analysis()`. Outputs that reuse an argument's memory are free."""
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def needed_when_out_of_memory(message: str) -> int | None:
    """Return the bytes that a program needed when it did not fit a chip's memory (HBM); None if not in the message."""
    match = _OUT_OF_MEMORY.search(message)
    if match is None:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return round(float(number) * _UNITS[unit])


@dataclass(frozen=True)
class Cycles:
    """Estimated cycles of one run of a program on one chip.

    Attributes:
      total: the sum over all instructions with an estimate.
      groups: cycles by purpose, largest first. They sum to `total`.
      without_estimate: the number of instructions without an estimate, by kind. In a loop they count each time.
      unknown_loops: the number of loops of unknown length, which `total` counts as if they ran once.
    """

    total: int
    groups: dict[str, int]
    without_estimate: dict[str, int]
    unknown_loops: int


def cycles(program: Program) -> Cycles:
    """Sum the compiler's estimates over everything that runs, and count the instructions without one."""
    groups: Counter[str] = Counter()
    without_estimate: Counter[str] = Counter()
    has_gradients = any("transpose(" in instruction.op_name for instruction, _ in program.schedule())
    unknown_loops = 0
    for instruction, times in program.schedule():
        if program.trip_count(instruction) is None:
            unknown_loops += 1
        if instruction.cycles is not None:
            groups[_group(program, instruction, has_gradients)] += instruction.cycles * times
            continue
        kind = _unestimated_kind(program, instruction)
        if kind:
            without_estimate[kind] += times
    return Cycles(
        total=sum(groups.values()),
        groups=dict(groups.most_common()),
        without_estimate=dict(without_estimate.most_common()),
        unknown_loops=unknown_loops,
    )


def _unestimated_kind(program: Program, instruction: Instruction) -> str:
    """Return the kind of work of an instruction without an estimate, or "" if it is not worth counting."""
    opcode = instruction.opcode
    if opcode in _FREE or any(f'"{name}"' in instruction.text for name in _FREE_CALLS):
        return ""
    if opcode.endswith("-done"):  # counted at its `-start`
        return ""
    if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        return "copies in the background"
    if 'async_execution_thread="sparsecore"' in instruction.text:
        return "work of the sparse core"
    fused_opcodes = {fused.opcode for fused in program.fused(instruction)}
    if any(fused_opcode.removesuffix("-start") in _COLLECTIVES for fused_opcode in fused_opcodes):
        # An overlapped collective is two fusions, one where it starts and one where it ends. Count the first.
        return "" if instruction.name.startswith("async-collective-done") else "collectives"
    if all(elements <= 1 for elements in element_counts(instruction.result)):
        return ""
    if opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
        return f"custom call {target[1] if target else ''}".strip()
    if fused_opcodes & {"gather", "scatter"}:
        return "gather or scatter"
    return opcode


def _group(program: Program, instruction: Instruction, has_gradients: bool) -> str:
    """Return the purpose of an instruction's cycles, such as "backward: dense matmul + dropout bits"."""
    fused = list(program.fused(instruction))
    source = instruction.op_name or next((inner.op_name for inner in reversed(fused) if inner.op_name), "")
    fused_kinds = {_kind(inner, program.functions_of(inner), _phase(inner.op_name, has_gradients)) for inner in fused}
    kinds = [kind for kind in _KINDS if kind in fused_kinds]
    if not kinds:
        opcodes = {inner.opcode for inner in fused} - _MOVES
        if not opcodes:
            kinds = ["copies and layout"]
        elif opcodes == {"convert"}:
            kinds = ["casts"]
        else:
            kinds = [source.rpartition("/")[2] or instruction.opcode]
    return f"{_phase(source, has_gradients)}: {' + '.join(kinds)}"


def _phase(op_name: str, has_gradients: bool) -> str:
    """Return the phase of a training step that an operation belongs to. Without gradients, everything is forward."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    if "jvp(" in op_name or not has_gradients:
        return "forward"
    return "update" if op_name else "no source"


# In the order in which a fusion of several kinds lists them.
_KINDS = (
    "attention matmul",
    "dense matmul",
    "kernel",
    "collective",
    "dropout bits",
    "softmax",
    "layer norm",
    "activation",
    "embedding",
    "accumulation",
    "optimizer",
)
_MOVES = frozenset(
    (
        "bitcast",
        "broadcast",
        "constant",
        "copy",
        "get-tuple-element",
        "parameter",
        "reshape",
        "slice",
        "transpose",
        "tuple",
    )
)


def _kind(instruction: Instruction, functions: tuple[str, ...], phase: str) -> str:
    """Return the kind of work of one instruction.

    It is "" for minor work, which takes the kind of the work that it is fused with.
    """
    name, opcode = instruction.op_name, instruction.opcode
    if opcode in _MOVES:
        return ""
    if opcode in _MATMULS:
        return "attention matmul" if _has_batch_axis(name) else "dense matmul"
    if opcode == "custom-call" and "tpu_custom_call" in instruction.text:
        return "kernel"
    if opcode.removesuffix("-start") in _COLLECTIVES:
        return "collective"
    if re.search(r"threefry|bernoulli|random_bits|rng", f"{name} {opcode}"):
        return "dropout bits"
    if re.search(r"/(erfc?|tanh|logistic)$", name):
        return "activation"
    if name.endswith("/exp") and "log_softmax" not in name or "(softmax)" in name:
        return "softmax"
    if any(function.startswith("LayerNorm.") for function in functions):
        return "layer norm"
    if opcode in ("gather", "scatter") or any(function.startswith("Embed.") for function in functions):
        return "embedding"
    if phase == "update":
        return "accumulation" if "while/body" in name else "optimizer"
    return ""


def _has_batch_axis(op_name: str) -> bool:
    """Return whether an `einsum` has an axis in both factors and the result, as only products of activations have."""
    return any(set(a) & set(b) & set(c) for a, b, c in re.findall(r"(\w+),(\w+)->(\w+)", op_name))


def collectives(program: Program) -> dict[str, int]:
    """Return the bytes that one chip receives in one run, by kind of collective, largest first.

    The bytes are the size of the result: the reduced arrays of an all-reduce, everything that an all-gather gathers,
    and the chip's own shard of a reduce-scatter. An asynchronous collective counts once. In a loop it counts each time.
    """
    received: dict[tuple[str, str], int] = {}  # (kind, key of one collective) -> bytes
    for name, instructions in program.computations.items():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-done")
            if kind not in _COLLECTIVES or not program.executions[name]:
                continue
            result = instruction.result
            if kind == "all-reduce" and "all-reduce-scatter" in name:  # the TPU compiler's form of a reduce-scatter
                kind, result = "reduce-scatter", instructions[-1].result
            # An overlapped collective is split into several fusions, which share a channel. Others may share one too.
            channel = None
            if "chain_id=" in instruction.text:
                channel = re.search(r"channel_id=(\d+)", instruction.text)
            key = (kind, channel[1] if channel else f"{name} {instruction.name}")
            received[key] = max(received.get(key, 0), num_bytes(result) * program.executions[name])
    totals: Counter[str] = Counter()
    for (kind, _), amount in received.items():
        totals[kind] += amount
    return dict(totals.most_common())
