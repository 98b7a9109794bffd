"""Compiling a step for a topology, and measuring what the compiled program needs."""

from typing import Any

import jax

from xtransfer.errors import one_line
from xtransfer.precompile import cost, hlo
from xtransfer.precompile.steps import Step
from xtransfer.precompile.topology import FITTING_LIBTPU, Chip
from xtransfer.runtime.sharding import data_shards

_GROUPS = 10


def measure(step: Step, chip: Chip, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compile a step and return its row of the JSON output, which has no cycles if the step does not fit."""
    chips = mesh.devices.size
    row: dict[str, Any] = {
        "step": step.name,
        "rows_per_chip": step.row_sizes[-1] // data_shards(mesh),
        "row_length": step.row_length,
        "hbm_gib": None,
        "fits": False,
        "estimated_mcycles": None,
        "matmul_limit_mcycles": step.flops / chips / chip.flops_per_cycle / 1e6,
        "collective_bytes": {},
        "mesh": dict(mesh.shape),
        "parts": step.microbatches,
        "batch_shapes": len(step.row_sizes),
        "row_sizes": list(step.row_sizes),
    }
    try:
        program = step.function.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = cost.needed_when_out_of_memory(str(error))
        return row | {"hbm_gib": needed and needed / cost.GIB, "compiler": one_line(error, limit=500)}
    memory = cost.memory(program.memory_analysis())
    row |= {
        "hbm_gib": memory.total / cost.GIB,
        "fits": memory.total <= chip.memory * cost.GIB,
        "arguments_gib": memory.arguments / cost.GIB,
        "temporaries_gib": memory.temporaries / cost.GIB,
        "outputs_gib": memory.outputs / cost.GIB,
        "code_gib": memory.code / cost.GIB,
    }
    try:
        read = hlo.parse(program.as_text())
    except jax.errors.JaxRuntimeError:
        return row | {"compiler": f"its program cannot be read by jax {jax.__version__}: {FITTING_LIBTPU}"}
    cycles = cost.cycles(read)
    return row | {
        "estimated_mcycles": cycles.total / 1e6,
        "estimated_milliseconds": cycles.total / chip.clock / 1e6,
        "groups": {name: count / 1e6 for name, count in list(cycles.groups.items())[:_GROUPS]},
        "ops_without_estimate": sum(cycles.without.values()),
        "without_estimate": cycles.without,
        "loops_of_unknown_length": cycles.unknown_loops,
        "collective_bytes": cost.collectives(read),
    }
