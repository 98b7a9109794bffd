"""HLO, the text of a compiled program, as data: its computations, what runs, and which function each part is from."""

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


@dataclass(frozen=True)
class Instruction:
    """One line of a program: name, opcode, the result's type as written, and the rest of the line."""

    name: str
    opcode: str
    result: str
    line: str

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """JAX's name for its operation (`jit(step)/jvp()/dot_general`), or "" if unknown."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.line)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """The names of the computations that it refers to."""
        branches = [name.strip().lstrip("%") for part in _BRANCHES.findall(self.line) for name in part.split(",")]
        return [*_CALLED.findall(self.line), *branches]


@dataclass(frozen=True)
class Program:
    """The text of a compiled program: its computations by name, the entry, and the functions of each part."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    functions: dict[int, tuple[str, ...]] = field(default_factory=dict)  # stack frame -> functions, the innermost first

    @cached_property
    def executions(self) -> dict[str, int]:
        """Count how often each computation runs, inside fusions too; a loop of unknown length counts once."""
        times: Counter[str] = Counter()

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations[name]:
                turns = self.turns(instruction) or 1
                for called in instruction.called:
                    if called in self.computations:
                        visit(called, count * turns)

        visit(self.entry, 1)
        return times

    def turns(self, instruction: Instruction) -> int | None:
        """Return how often a `while` runs (1 for any other instruction), or None if the text does not say.

        Loops of known length count up from 0 and compare with a constant. JAX's loops count by 1, as s32. Loops that
        the compiler makes, to hide a collective behind a product, count by what their body adds, as u32.
        """
        if instruction.opcode != "while":
            return 1
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.line):
            return int(known[1])
        condition = self._named(instruction, "condition")
        limits = [(found[1], int(found[2])) for line in condition if (found := _CONSTANT.search(line.line))]
        compared = [line for line in condition if line.opcode == "compare" and "direction=LT" in line.line]
        if len(limits) != 1 or len(compared) != 1:
            return None
        kind, limit = limits[0]
        step = 1 if kind == "s32" else self._step(self._named(instruction, "body"), condition)
        return -(-limit // step) if step else None

    def _named(self, instruction: Instruction, role: str) -> tuple[Instruction, ...]:
        name = re.search(rf"{role}=%?([\w.\-]+)", instruction.line)
        return self.computations.get(name[1], ()) if name else ()

    def _step(self, body: tuple[Instruction, ...], condition: tuple[Instruction, ...]) -> int | None:
        """Return what a loop's body adds to the one number that its condition compares; None if that is not plain."""
        looked_at = [
            found[1] for line in condition if (found := re.search(r"get-tuple-element\(.*index=(\d+)", line.line))
        ]
        if len(looked_at) != 1 or not body or body[-1].opcode != "tuple":
            return None
        lines = {line.name: line for line in body}
        results = _OPERANDS.findall(body[-1].line.partition(" tuple(")[2])
        added = lines.get(results[int(looked_at[0])]) if int(looked_at[0]) < len(results) else None
        if added is None or added.opcode != "add":
            return None
        operands = [lines.get(name) for name in _OPERANDS.findall(added.line.partition(" add(")[2].partition(")")[0])]
        steps = [int(found[2]) for line in operands if line and (found := _CONSTANT.search(line.line))]
        return steps[0] if len(steps) == 1 else None

    def run(self) -> Iterator[tuple[Instruction, int]]:
        """Yield what runs in order, and how often: the entry computation with its loops, calls, and all branches."""

        def visit(name: str, count: int) -> Iterator[tuple[Instruction, int]]:
            for instruction in self.computations[name]:
                yield instruction, count
                if instruction.opcode in ("while", "call", "conditional"):
                    for called in instruction.called:
                        yield from visit(called, count * (self.turns(instruction) or 1))

        return visit(self.entry, 1)

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yield the instruction itself or, for a fusion, everything that was fused into it."""
        bodies = [name for name in instruction.called if name in self.computations]
        if instruction.opcode not in ("fusion", "async-start") or not bodies:
            yield instruction
            return
        for name in bodies:
            for line in self.computations[name]:
                yield from self.inside(line)

    def written_by(self, instruction: Instruction) -> tuple[str, ...]:
        """Return the Python functions that an instruction comes from, the innermost first."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.line)
        return self.functions.get(int(frame[1]), ()) if frame else ()


def parse(text: str) -> Program:
    """Return a program from `Compiled.as_text()`; ValueError if the text has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            opcode = _OPCODE.search(found[2])
            if opcode:
                current.append(Instruction(found[1], opcode[1], found[2][: opcode.start()].strip(), found[2]))
    if not entry:
        raise ValueError("the program's text has no entry computation")
    return Program({name: tuple(lines) for name, lines in computations.items()}, entry, _functions(text))


def _functions(text: str) -> dict[int, tuple[str, ...]]:
    """Return the functions of each stack frame, from the tables at the head of the text; empty without tables."""

    def table(name: str, row: str) -> list[Any]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        return re.findall(row, found[1], re.MULTILINE) if found else []

    names: dict[str, str] = dict(table("FunctionNames", r'^(\d+) "(.*)"$'))
    places: dict[str, str] = dict(table("FileLocations", r"^(\d+) \{.*function_name_id=(\d+)"))
    rows = table("StackFrames", r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")
    frames: dict[str, tuple[str, str]] = {frame: (place, parent) for frame, place, parent in rows}
    # If a frame names itself, the number of its parent is one too high: 1 stands for none.
    shift = int(any(frame == parent for frame, (_, parent) in frames.items()))
    found: dict[int, tuple[str, ...]] = {}
    for frame in frames:
        chain: list[str] = []
        at = frame
        while at in frames and len(chain) <= len(frames):
            place, parent = frames[at]
            chain.append(names.get(places.get(place, ""), ""))
            at = str(int(parent) - shift)
        found[int(frame)] = tuple(chain)
    return found


def size(result: str) -> int:
    """Return the bytes of an array, or a tuple of arrays, from its type as written (`bf16[8,128]{1,0}`), unpadded."""
    return sum(math.ceil(bits * elements / 8) for bits, elements in _arrays(result))


def element_counts(result: str) -> list[int]:
    """Return the number of elements of every array in a type as written."""
    return [elements for _, elements in _arrays(result)]


def _arrays(result: str) -> Iterator[tuple[int, int]]:
    """Yield (bits per element, elements) of every array in a type."""
    for kind, axes in _SHAPE.findall(result):
        if kind != "token":
            bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
            yield bits, math.prod(int(axis) for axis in axes.split(",") if axis)
