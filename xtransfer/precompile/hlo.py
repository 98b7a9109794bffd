"""Parse HLO, the text of a compiled program: its computations, how often they run, and where instructions are from."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^([su]32)\[\]\S* constant\((\d+)\)")
_OPERANDS = re.compile(r"%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TUPLE_INDEX = re.compile(r"get-tuple-element\(.*index=(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a program.

    Attributes:
      name: its name, without the leading %.
      opcode: its operation, such as "fusion".
      result: the type of its result, as written.
      text: everything after the "=".
    """

    name: str
    opcode: str
    result: str
    text: str

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match else None

    @property
    def op_name(self) -> str:
        """JAX's name for the operation (`jit(step)/jvp()/dot_general`), or "" if unknown."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
        return match[1] if match else ""

    @property
    def called(self) -> list[str]:
        """The names of the computations that the instruction refers to."""
        names: list[str] = _CALLED.findall(self.text)
        for branches in _BRANCHES.findall(self.text):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return names


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: the instructions of each computation, by its name.
      entry: the name of the computation that runs first.
      functions: the Python functions of each stack frame, innermost first.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    functions: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def executions(self) -> dict[str, int]:
        """The number of times that each computation runs, in fusions too. A loop of unknown length counts once."""
        times: Counter[str] = Counter()

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations[name]:
                trips = self.trip_count(instruction) or 1
                for called in instruction.called:
                    if called in self.computations:
                        visit(called, count * trips)

        visit(self.entry, 1)
        return times

    def trip_count(self, instruction: Instruction) -> int | None:
        """Return how often a `while` runs its body (1 for other instructions), or None if the text does not say.

        A loop of known length counts up from 0 and compares its counter with a constant. JAX's own loops count by 1, in
        s32. Loops that the compiler adds, to hide a collective behind a product, count in u32 by a constant that their
        body adds.
        """
        if instruction.opcode != "while":
            return 1
        known = _TRIP_COUNT.search(instruction.text)
        if known:
            return int(known[1])
        condition = self._computation_of(instruction, "condition")
        limits = [match for line in condition if (match := _CONSTANT.search(line.text))]
        comparisons = [line for line in condition if line.opcode == "compare" and "direction=LT" in line.text]
        if len(limits) != 1 or len(comparisons) != 1:
            return None
        kind, limit = limits[0][1], int(limits[0][2])
        step = 1 if kind == "s32" else self._loop_step(self._computation_of(instruction, "body"), condition)
        return math.ceil(limit / step) if step else None

    def _computation_of(self, loop: Instruction, role: str) -> tuple[Instruction, ...]:
        """Return the "condition" or the "body" of a loop, or an empty one if the text lacks it."""
        name = re.search(rf"{role}=%?([\w.\-]+)", loop.text)
        return self.computations.get(name[1], ()) if name else ()

    def _loop_step(self, body: tuple[Instruction, ...], condition: tuple[Instruction, ...]) -> int | None:
        """Return the constant that a loop's body adds to its counter, or None if it does not simply add one."""
        indices = [int(match[1]) for line in condition if (match := _TUPLE_INDEX.search(line.text))]
        if len(indices) != 1 or not body or body[-1].opcode != "tuple":
            return None
        by_name = {line.name: line for line in body}
        results = _OPERANDS.findall(body[-1].text.partition(" tuple(")[2])
        if indices[0] >= len(results):
            return None
        next_count = by_name.get(results[indices[0]])
        if next_count is None or next_count.opcode != "add":
            return None
        operand_names = _OPERANDS.findall(next_count.text.partition(" add(")[2].partition(")")[0])
        operands = [by_name[name] for name in operand_names if name in by_name]
        steps = [int(match[2]) for operand in operands if (match := _CONSTANT.search(operand.text))]
        return steps[0] if len(steps) == 1 else None

    def schedule(self) -> Iterator[tuple[Instruction, int]]:
        """Yield each instruction that runs on its own, and how often. This includes loops, calls, and all branches."""

        def visit(name: str, count: int) -> Iterator[tuple[Instruction, int]]:
            for instruction in self.computations[name]:
                yield instruction, count
                if instruction.opcode in ("while", "call", "conditional"):
                    for called in instruction.called:
                        yield from visit(called, count * (self.trip_count(instruction) or 1))

        return visit(self.entry, 1)

    def fused(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yield everything that was fused into an instruction, or the instruction itself if it is not a fusion."""
        bodies = [name for name in instruction.called if name in self.computations]
        if instruction.opcode not in ("fusion", "async-start") or not bodies:
            yield instruction
            return
        for name in bodies:
            for inner in self.computations[name]:
                yield from self.fused(inner)

    def functions_of(self, instruction: Instruction) -> tuple[str, ...]:
        """Return the Python functions that an instruction comes from, innermost first."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.text)
        return self.functions.get(int(frame[1]), ()) if frame else ()


def parse(text: str) -> Program:
    """Parse the text from `Compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], [])
                if head[1]:
                    entry = head[2]
            continue
        if line.startswith("}"):
            current = None
            continue
        match = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(match[2]) if match else None
        if match and opcode:
            current.append(Instruction(match[1], opcode[1], match[2][: opcode.start()].strip(), match[2]))
    if not entry:
        raise ValueError("the program's text has no entry computation")
    return Program({name: tuple(lines) for name, lines in computations.items()}, entry, _functions(text))


def _functions(text: str) -> dict[int, tuple[str, ...]]:
    """Return the functions of each stack frame, from the tables at the head of the text; empty if it has none."""

    def table(name: str, row: str) -> list[Any]:
        match = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return re.findall(row, match[1], re.MULTILINE) if match else []

    names: dict[str, str] = dict(table("FunctionNames", r'^(\d+) "(.*)"$'))
    locations: dict[str, str] = dict(table("FileLocations", r"^(\d+) \{.*function_name_id=(\d+)"))
    rows = table("StackFrames", r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")
    frames: dict[str, tuple[str, str]] = {frame: (location, parent) for frame, location, parent in rows}
    # If a frame is listed as its own parent, parents are listed one too high, and 1 stands for none.
    shift = int(any(frame == parent for frame, (_, parent) in frames.items()))
    functions: dict[int, tuple[str, ...]] = {}
    for frame in frames:
        chain: list[str] = []
        current = frame
        while current in frames and len(chain) <= len(frames):
            location, parent = frames[current]
            chain.append(names.get(locations.get(location, ""), ""))
            current = str(int(parent) - shift)
        functions[int(frame)] = tuple(chain)
    return functions


def num_bytes(result: str) -> int:
    """Return the bytes of an array or a tuple of arrays, without padding, from its type as written (`bf16[8,128]`)."""
    return sum(math.ceil(bits * elements / 8) for bits, elements in _arrays(result))


def element_counts(result: str) -> list[int]:
    """Return the number of elements of each array in a type as written."""
    return [elements for _, elements in _arrays(result)]


def _arrays(result: str) -> Iterator[tuple[int, int]]:
    """Yield (bits per element, number of elements) for each array in a type as written."""
    for kind, axes in _SHAPE.findall(result):
        if kind != "token":
            bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
            yield bits, math.prod(int(axis) for axis in axes.split(",") if axis)
