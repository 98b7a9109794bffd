"""Compile a step for a topology, and measure the memory and cycles of the compiled program."""

from typing import Any

import jax

from xtransfer.errors import one_line
from xtransfer.precompile import cost, hlo
from xtransfer.precompile.steps import Step
from xtransfer.precompile.topology import FITTING_LIBTPU, Chip
from xtransfer.runtime.sharding import data_shards

_MAX_GROUPS = 10  # reported


def compile_and_measure(step: Step, chip: Chip, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compile a step and return its entry in the JSON report. It has no cycles if the step does not fit into a chip."""
    chips = mesh.devices.size
    report: dict[str, Any] = {
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
        compiled = step.function.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = cost.needed_when_out_of_memory(str(error))
        needed_gib = None if needed is None else needed / cost.GIB
        return report | {"hbm_gib": needed_gib, "compiler": one_line(error, limit=500)}
    memory = cost.memory(compiled.memory_analysis())
    report |= {
        "hbm_gib": memory.total / cost.GIB,
        "fits": memory.total <= chip.memory * cost.GIB,
        "arguments_gib": memory.arguments / cost.GIB,
        "temporaries_gib": memory.temporaries / cost.GIB,
        "outputs_gib": memory.outputs / cost.GIB,
        "code_gib": memory.code / cost.GIB,
    }
    try:
        program = hlo.parse(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return report | {
            "compiler": f"jax {jax.__version__} cannot read the program of this libtpu; install one that fits: "
            f"{FITTING_LIBTPU}"
        }
    cycles = cost.cycles(program)
    return report | {
        "estimated_mcycles": cycles.total / 1e6,
        "estimated_milliseconds": cycles.total / chip.clock / 1e6,
        "groups": {name: count / 1e6 for name, count in list(cycles.groups.items())[:_MAX_GROUPS]},
        "ops_without_estimate": sum(cycles.without_estimate.values()),
        "without_estimate": cycles.without_estimate,
        "loops_of_unknown_length": cycles.unknown_loops,
        "collective_bytes": cost.collectives(program),
    }
