"""The cost of compiled programs: small texts written by hand, and one that the TPU compiler wrote.

`fixtures/compiled/v5e_loop.txt` is a program that libtpu 0.0.52 compiled for v5e:2x4. It computes a gradient of
`sum(tanh(x @ w)²)`, summed by a scan over four microbatches of x, with w [4096, 4096] bfloat16 sharded along its first
axis over eight chips. Each instruction was reduced to its operation, estimated cycles, and source. The sums below were
computed with awk.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from xtransfer.precompile import cost, hlo

LOOP = Path(__file__).parents[1] / "fixtures" / "compiled" / "v5e_loop.txt"


def op(operation: str, *, source: str = "", cycles: int | None = None, frame: int = 0) -> str:
    """Return an instruction as the compiler writes it, with its source and its estimate."""
    fields = [operation]
    if source:
        fields.append(f'metadata={{op_name="{source}" stack_frame_id={frame}}}')
    if cycles is not None:
        fields.append(f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}')
    return ", ".join(fields)


def program(*lines: str, before: str = "") -> hlo.Program:
    """Return a program whose entry computation has these lines, after other computations."""
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"HloModule jit_step\n\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def computation(name: str, *lines: str) -> str:
    """Return the text of a computation."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def test_outputs_that_reuse_arguments_are_counted_once() -> None:
    analysis = SimpleNamespace(
        argument_size_in_bytes=100,
        temp_size_in_bytes=30,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        generated_code_size_in_bytes=4,
    )
    memory = cost.memory(analysis)
    assert (memory.arguments, memory.temporaries, memory.outputs, memory.code, memory.total) == (100, 30, 10, 4, 144)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (56.00G) exceeds available HBM (15.75G). HLO module: jit__lambda.",
            56 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded",
            20.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 512.0K of 256.0K vmem.", None),
        ("RESOURCE_EXHAUSTED: too much", None),
    ],
)
def test_bytes_needed_by_a_program_that_does_not_fit(message: str, needed: float | None) -> None:
    assert cost.needed_when_out_of_memory(message) == needed


def test_program_of_the_tpu_compiler() -> None:
    program = hlo.parse(LOOP.read_text())
    cycles = cost.cycles(program)
    # The loop runs four times. There are 59,076 cycles outside of it and 370,670 in each iteration.
    assert cycles.total == 59_076 + 4 * 370_670 == sum(cycles.groups.values())
    assert cycles.groups["backward: dense matmul"] == 4 * 166_923
    assert cycles.groups["forward: dense matmul + activation"] == 4 * 70_450
    assert cycles.unknown_loops == 0
    # Each iteration gathers w, 4096 × 4096 × 2 bytes, and a chip keeps an eighth of its gradient.
    assert cost.collectives(program) == {"all-gather": 4 * 2**25, "reduce-scatter": 4 * 2**22}
    assert cycles.without_estimate["collectives"] == 4 * 2


FUSED = computation(
    "fused",
    op("%dot = f32[8] convolution(%p, %w)", source="jit(step)/transpose(jvp(rqnd,rknd->rnqk))/dot_general"),
    op("ROOT %bits = u32[8] xor(%a, %b)", source="jit(step)/jvp(jit(_bernoulli))/jit(_uniform)/xor"),
)


@pytest.mark.parametrize(
    ("line", "group"),
    [
        (op("%x = f32[8] convolution(%p, %w)", source="jit(step)/jvp()/dot_general"), "forward: dense matmul"),
        (op("%x = f32[8] dot(%p, %w)", source="jit(step)/transpose(jvp())/dot_general"), "backward: dense matmul"),
        (
            op("%x = f32[8] convolution(%p, %w)", source="jit(step)/jvp(rnqk,rknd->rqnd)/dot_general"),
            "forward: attention matmul",
        ),
        (
            op("%x = f32[8] convolution(%p, %w)", source="jit(step)/jvp(rsh,hknd->rskn)/dot_general"),
            "forward: dense matmul",
        ),
        (
            op("%x = f32[8] fusion(%p), kind=kOutput, calls=%fused", source="jit(step)/transpose(jvp())/add"),
            "backward: attention matmul + dropout bits",
        ),
        (
            op("%x = f32[8] multiply(%p, %p)", source="jit(step)/transpose(jvp(checkpoint))/rematted_computation/mul"),
            "recomputed: mul",
        ),
        (op("%x = f32[8] multiply(%p, %p)", source="jit(step)/mul"), "update: optimizer"),
        (op("%x = f32[8] add(%p, %p)", source="jit(step)/while/body/closed_call/add"), "update: accumulation"),
        (op("%x = f32[8] exponential(%p)", source="jit(step)/jvp()/exp"), "forward: softmax"),
        (op("%x = f32[8] exponential(%p)", source="jit(step)/jvp(jit(log_softmax))/exp"), "forward: exp"),
        (op("%x = f32[8] multiply(%p, %p)", source="jit(step)/jvp()/erf"), "forward: activation"),
        (op("%x = f32[8] multiply(%p, %p)", source="jit(step)/jvp()/mul", frame=2), "forward: layer norm"),
        (op("%x = f32[8] convert(%p)", source="jit(step)/jvp()/convert_element_type"), "forward: casts"),
        (op("%x = f32[8] copy(%p)", source="jit(step)/jvp()/transpose"), "forward: copies and layout"),
        (op("%x = f32[8] broadcast(%p)", source="jit(step)/jvp()/mul", frame=2), "forward: copies and layout"),
        (op("%x = f32[8] copy(%p)"), "no source: copies and layout"),
        (op("%x = f32[8] gather(%p)", source="jit(step)/jvp(jit(_take))/gather"), "forward: embedding"),
        (
            '%x = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp()/k"}',
            "forward: kernel",
        ),
        (op("%x = f32[8] all-reduce(%p)", source="jit(step)/transpose(jvp())/dot_general"), "backward: collective"),
    ],
)
def test_cycles_are_grouped_by_purpose(line: str, group: str) -> None:
    tables = (
        'FunctionNames\n1 "main"\n2 "LayerNorm.__call__"\n\n'
        "FileLocations\n1 {file_name_id=1 function_name_id=1}\n2 {file_name_id=1 function_name_id=2}\n\n"
        "StackFrames\n1 {file_location_id=1 parent_frame_id=0}\n2 {file_location_id=2 parent_frame_id=1}\n\n"
    )
    estimated = f'{line}, backend_config={{"estimated_cycles":"5"}}'
    without_source = op("%y = f32[8] negate(%p)", cycles=7)
    backward = op("%z = f32[8] negate(%p)", source="jit(step)/transpose(jvp())/neg", cycles=1)
    cycles = cost.cycles(program(estimated, without_source, backward, before=tables + FUSED))
    assert cycles.groups[group] >= 5 and cycles.total == 13


def test_everything_is_forward_without_a_gradient() -> None:
    line = op("%x = f32[8] negate(%p)", source="jit(logits)/neg", cycles=3)
    assert cost.cycles(program(line)).groups == {"forward: neg": 3}


def test_groups_are_largest_first_and_sum_to_the_total() -> None:
    lines = [op(f"%x.{n} = f32[8] negate(%p)", source=f"jit(f)/{n}", cycles=n) for n in (3, 9, 5)]
    cycles = cost.cycles(program(*lines))
    assert list(cycles.groups.items()) == [("forward: 9", 9), ("forward: 5", 5), ("forward: 3", 3)]
    assert cycles.total == 17


def test_instructions_without_an_estimate_are_counted_by_kind() -> None:
    before = computation("table", "ROOT %g = f32[8] gather(%p)") + computation(
        "sent", "ROOT %a = f32[8] all-gather(%p)"
    )
    cycles = cost.cycles(
        program(
            "%p = f32[8] parameter(0)",
            "%c = f32[] constant(1)",
            "%s = f32[1]{0} add(%c, %c)",  # a single number costs nothing
            "%g = f32[8] fusion(%p), kind=kCustom, calls=%table",
            "%cs = (f32[8], f32[8], u32[]) copy-start(%p)",
            "%cd = f32[8] copy-done(%cs)",
            "%async-collective-start = (f32[8], f32[8]) fusion(%p), kind=kCustom, calls=%sent",
            "%async-collective-done = f32[8] fusion(%p), kind=kCustom, calls=%sent",
            '%cat = f32[8] custom-call(%p), custom_call_target="ConcatBitcast"',
            '%k = f32[8] custom-call(%p), custom_call_target="tpu_custom_call"',
            "%r = f32[8] reverse(%p)",
            '%o = (f32[8], f32[8]) call-start(%p), async_execution_thread="sparsecore", to_apply=%table',
            '%d = f32[8] call-done(%o), async_execution_thread="sparsecore"',
            before=before,
        )
    )
    assert cycles.total == 0
    assert cycles.without_estimate == {
        "gather or scatter": 1,
        "copies in the background": 1,
        "collectives": 1,
        "custom call tpu_custom_call": 1,
        "reverse": 1,
        "work of the sparse core": 1,
    }


def test_loops_of_unknown_length_are_counted() -> None:
    before = computation("body", op("ROOT %x = f32[8] negate(%p)", cycles=4)) + computation("open")
    cycles = cost.cycles(program("%w = f32[8] while(%p), condition=%open, body=%body", before=before))
    assert (cycles.total, cycles.unknown_loops) == (4, 1)


def test_each_collective_counts_once_with_its_result() -> None:
    scatter = computation(
        "all-reduce-scatter.1",
        "%r = bf16[64]{0} all-reduce(%p), channel_id=5",
        "ROOT %d = bf16[8]{0} dynamic-slice(%r)",
    )
    other_scatter = scatter.replace("scatter.1", "scatter.2")  # has the same channel
    gather = 'all-gather(%p), channel_id=7, frontend_attributes={chain_id="2"}'
    gather_parts = [computation(f"part.{n}", f"ROOT %g.{n} = bf16[16]{{0}} {gather}") for n in range(3)]
    unused = computation("never", "ROOT %n = f32[99]{0} collective-broadcast(%p)")
    received = cost.collectives(
        program(
            "%m = f32[8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
            "%n = f32[8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2",
            *(f"%f.{n} = f32[8] fusion(%p), kind=kCustom, calls=%part.{n}" for n in range(3)),
            "%r = (f32[8]{0}, /*index=1*/f32[2]{0}) all-reduce(%p, %q), channel_id=1",
            "%gs = (f32[8]{0}, f32[64]{0}) all-gather-start(%p), channel_id=2",
            "%gd = f32[64]{0} all-gather-done(%gs)",
            "%ps = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=3",
            "%pd = f32[8]{0} collective-permute-done(%ps)",
            "%t = f32[4]{0} all-to-all(%p), channel_id=4",
            before="".join([scatter, other_scatter, *gather_parts, unused]),
        )
    )
    assert received == {
        "all-gather": 256 + 32,  # the one in three fusions counts once
        "all-reduce": 40,
        "collective-permute": 32,
        "all-to-all": 16,
        "reduce-scatter": 2 * 16,  # a chip keeps an eighth
    }
