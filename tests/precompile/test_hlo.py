"""Parsing the text of small, hand-written programs."""

import pytest

from xtransfer.precompile import hlo

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

FunctionNames
1 "outer"
2 "Norm.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=4 end_column=9}
2 {file_name_id=1 function_name_id=2 line=7 end_line=7 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%inner (a: f32[8]) -> f32[8] {
  ROOT %negate.1 = f32[8]{0:T(128)} negate(%a), metadata={op_name="jit(step)/neg" stack_frame_id=2}
}

%fused (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  ROOT %again = f32[8]{0:T(128)} fusion(%a), kind=kLoop, calls=%inner
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %fusion.1 = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  ROOT %tuple.1 = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)S(1)}) tuple(%i, %fusion.1)
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%open (state: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%open, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %while.3 = (s32[], f32[8]{0}) while(%t), condition=%open, body=%body
  ROOT %copy.1 = f32[8]{0:T(128)} copy(%g), metadata={op_name="jit(f)/a\\"b"}, backend_config={"estimated_cycles":"9"}
}
"""


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    return hlo.parse(TEXT)


def instruction(program: hlo.Program, name: str) -> hlo.Instruction:
    """Return the instruction of that name."""
    return next(line for lines in program.computations.values() for line in lines if line.name == name)


def test_computations_and_fields_of_instructions(program: hlo.Program) -> None:
    assert program.entry == "main"
    assert set(program.computations) == {"inner", "fused", "body", "condition", "open", "main"}
    body_result = instruction(program, "tuple.1")
    assert (body_result.opcode, body_result.cycles, body_result.op_name) == ("tuple", None, "")
    assert body_result.result == "(s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)S(1)})"
    copy = instruction(program, "copy.1")
    assert (copy.opcode, copy.cycles, copy.op_name) == ("copy", 9, 'jit(f)/a\\"b')
    assert instruction(program, "while.1").called == ["condition", "body"]


def test_trip_count_is_from_the_compiler_or_the_condition(program: hlo.Program) -> None:
    names = ("while.1", "while.2", "while.3", "copy.1")
    assert {name: program.trip_count(instruction(program, name)) for name in names} == {
        "while.1": 5,
        "while.2": 3,
        "while.3": None,
        "copy.1": 1,
    }


def test_schedule_and_executions(program: hlo.Program) -> None:
    """Three loops run the body, 5, 3, and 1 times. The last has an unknown length."""
    counts = [count for line, count in program.schedule() if line.name == "fusion.1"]
    assert counts == [5, 3, 1]
    assert program.executions["body"] == program.executions["fused"] == program.executions["inner"] == 9


def test_fused_instructions(program: hlo.Program) -> None:
    assert [line.name for line in program.fused(instruction(program, "fusion.1"))] == ["a", "negate.1"]
    assert [line.name for line in program.fused(instruction(program, "while.1"))] == ["while.1"]


def test_functions_are_innermost_first(program: hlo.Program) -> None:
    assert program.functions_of(instruction(program, "negate.1")) == ("Norm.__call__", "outer")
    assert program.functions_of(instruction(program, "copy.1")) == ()
    zero_based = TEXT.replace("parent_frame_id=1}", "parent_frame_id=0}").replace(
        "parent_frame_id=2}", "parent_frame_id=1}"
    )
    assert hlo.parse(zero_based).functions == program.functions


@pytest.mark.parametrize(
    ("result", "size", "elements"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048, [1024]),
        ("f32[]{:T(128)}", 4, [1]),
        ("pred[3]{0}", 3, [3]),
        ("s4[3]{0}", 2, [3]),
        ("f8e4m3fn[5]{0}", 5, [5]),
        ("(f32[2,3]{1,0}, /*index=1*/u32[4]{0:S(2)}, token[])", 40, [6, 4]),
    ],
)
def test_bytes_of_a_type(result: str, size: int, elements: list[int]) -> None:
    assert hlo.num_bytes(result) == size and hlo.element_counts(result) == elements


def test_text_without_an_entry_computation_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="entry"):
        hlo.parse("HloModule nothing\n")


UNROLLED = """
%condition (p: (f32[8], u32[])) -> pred[] {{
  %p = (f32[8]{{0}}, u32[]) parameter(0)
  %limit = u32[]{{:T(128)}} constant({limit})
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%body (q: (f32[8], u32[])) -> (f32[8], u32[]) {{
  %q = (f32[8]{{0}}, u32[]) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%q), index=0
  %j = u32[] get-tuple-element(%q), index=1
  %one = u32[]{{:T(128)}} constant(1)
  %two = u32[]{{:T(128)}} constant(2)
  %between = u32[] add(%j, %one)
  %next = u32[] {step}
  ROOT %out = (f32[8]{{0}}, u32[]) tuple(%x, %next)
}}

ENTRY %main (a: (f32[8], u32[])) -> (f32[8], u32[]) {{
  %a = (f32[8]{{0}}, u32[]) parameter(0)
  ROOT %loop = (f32[8]{{0}}, u32[]) while(%a), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(
    ("limit", "step", "trips"),
    [
        (4, "add(%j, %two)", 2),
        (5, "add(%j, %two)", 3),
        (4, "add(%j, %one)", 4),
        (4, "add(%two, %j)", 2),
        (4, "multiply(%j, %two)", None),
        (4, "add(%j, %between)", None),
    ],
)
def test_trip_count_of_the_compilers_loops_depends_on_their_step(limit: int, step: str, trips: int | None) -> None:
    program = hlo.parse(UNROLLED.format(limit=limit, step=step))
    assert program.trip_count(instruction(program, "loop")) == trips
