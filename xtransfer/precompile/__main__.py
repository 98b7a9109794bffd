"""Binary: compiles the steps of an experiment for a TPU topology, on a machine without TPUs, and tells what they take.

    python -m xtransfer.precompile --config FILE[:arg] --topology v5e:2x4 [--json F] [--config.key=value …]

They are the very steps that `xtransfer.main` runs. Of each: a chip's memory, estimated cycles and what they are spent
on, collectives. It needs the package `libtpu`; weights are not read.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from xtransfer import config as settings
from xtransfer import experiment, storage
from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.data.batches import packing
from xtransfer.data.batches.batches import BatchPlan, TrainBatches, empty_batch, eval_row_sizes
from xtransfer.data.registry import Task, get_task
from xtransfer.distillation.objectives import OBJECTIVES, Objective
from xtransfer.errors import UserError, nearest
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.inference import INPUTS
from xtransfer.precompile import cost, hlo
from xtransfer.precompile.topology import EXAMPLES, FITTING_LIBTPU, Chip, chip_of, devices_of
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import batch_sharding, data_shards, make_mesh, path_name
from xtransfer.train.compiled_steps import Programs
from xtransfer.train.inputs import Reader, check_length, checkpoint_of, plan_of

STEPS = ("teacher_train", "labelling", "student_train", "evaluation")
_GROUPS = 10
_MOST = 2**20  # rows of a chip, or tokens of a row


@dataclass(frozen=True)
class Override:
    """A batch in place of the experiment's: rows on each shard of data × fsdp, tokens of a row, one text in a row."""

    rows: int | None = None
    row_length: int | None = None
    unpacked: bool = False


@dataclass(frozen=True)
class Step:
    """A step to be compiled.

    Attributes:
      name: one of `STEPS`.
      function: jitted, as training or inference calls it.
      arguments: of it, abstract.
      row_sizes: rows of the batches that a run has, ascending; the last is the one in `arguments`.
      row_length: tokens of a row.
      parts: that a batch is computed in, one after the other.
      flops: of the matrix products, all chips together, by the rule of 6 (training) or 2 for each parameter and token.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    row_sizes: tuple[int, ...]
    row_length: int
    parts: int
    flops: int


class Role:
    """The encoder of one role with its programs on a mesh, and the batches that it will see."""

    def __init__(self, role: str, config: ExperimentConfig, task: Task, mesh: jax.sharding.Mesh, override: Override):
        own: ModelConfig = getattr(config, role)
        if override.row_length:
            own = dataclasses.replace(own, row_length=override.row_length)
        self.settings = dataclasses.replace(own, packed=own.packed and not override.unpacked)
        self.role, self.config, self.task, self.mesh, self.rows = role, config, task, mesh, override.rows
        self.architecture = hf_checkpoint.read_config(checkpoint_of(role, own, only_config=True))
        check_length(role, own, self.architecture)
        self.programs = Programs(self.settings, self.architecture, len(task.labels), mesh)

    def train(self, name: str, objective: Objective) -> Step:
        """The training step by an objective."""
        plan, sizes = self._training(objective)
        batch = self._batch(plan, sizes[-1])
        key = jax.eval_shape(lambda: jax.random.key(0))
        arguments = (self.programs.abstract_state, batch, key)
        function, parts = self.programs.train_step(objective), self.programs.parts(batch)
        return self._step(name, function, arguments, plan, sizes, flops=6, parts=parts)

    def infer(self, name: str) -> Step:
        """The step that labelling and evaluation run."""
        plan = self._plan(self.config.evaluation_batch_size, 1)
        full, short = eval_row_sizes(plan)
        sizes = tuple(sorted({short, full})) if self.rows is None else (full,)
        batch = self._batch(plan, sizes[-1])
        arguments = (self.programs.abstract_params(), {key: batch[key] for key in INPUTS})
        return self._step(name, self.programs.eval_step, arguments, plan, sizes, flops=2)

    def _step(
        self,
        name: str,
        function: Any,
        arguments: tuple[Any, ...],
        plan: BatchPlan,
        sizes: tuple[int, ...],
        *,
        flops: int,
        parts: int = 1,
    ) -> Step:
        tokens = sizes[-1] * plan.row_length
        return Step(name, function, arguments, sizes, plan.row_length, parts, flops * tokens * self._parameters)

    @functools.cached_property
    def _parameters(self) -> int:
        """Those that every token is multiplied with: all but the tables that tokens are looked up in."""
        leaves = jax.tree_util.tree_leaves_with_path(self.programs.shapes)
        return sum(leaf.size for path, leaf in leaves if not path_name(path).endswith(".embedding"))

    def _plan(self, batch_size: int, parts: int) -> BatchPlan:
        """The layout of a batch without its tokenizer, which decides nothing of its shape."""
        shards = data_shards(self.mesh)
        if self.rows is not None and self.rows % parts:
            raise UserError(f"--rows-per-chip {self.rows} is not a multiple of {self.role}.accumulation {parts}")
        batch_size = batch_size if self.rows is None else self.rows * shards
        return plan_of(self.settings, self.architecture, batch_size, shards * parts)

    def _training(self, objective: Objective) -> tuple[BatchPlan, tuple[int, ...]]:
        """The layout of the training's batches and their row counts, which only packing takes the texts for."""
        plan = self._plan(self.settings.batch_size, self.settings.accumulation or 1)
        if self.rows is not None or not plan.packed:
            return plan, (packing.round_up(plan.batch_size, plan.multiple_of),)
        if plan.row_length < self.settings.max_length:
            raise UserError(f"--row-length {plan.row_length} is below {self.role}.max_length: give --rows-per-chip too")
        try:
            return self._training_of_texts(objective)
        except UserError as error:
            raise UserError(f"{error} (without data and tokenizer, give --rows-per-chip, or --unpacked)") from error

    def _training_of_texts(self, objective: Objective) -> tuple[BatchPlan, tuple[int, ...]]:
        tokens_dir = settings.cache_dir(self.config.task) / "tokens"
        reader = Reader(self.role, self.settings, shards=data_shards(self.mesh), token_cache=tokens_dir)
        material = experiment.gather(self.config, self.task)
        examples = material.everything if objective.data == "all" else material.labelled
        dataset, plan = reader.dataset(examples, len(self.task.labels), material.drawn_from), reader.training_plan
        return plan, TrainBatches(dataset, plan, 0).row_sizes

    def _batch(self, plan: BatchPlan, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        layout = batch_sharding(self.mesh)
        batch = empty_batch(plan, rows, len(self.task.labels))
        return {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for key, x in batch.items()}


def steps(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, override: Override, names: Sequence[str] = STEPS
) -> Iterator[Step]:
    """The steps of an experiment on a mesh, in the order of `STEPS`; an encoder is made when it is needed."""
    chosen = [experiment.chosen_objective(config, name) for name in config.objectives]
    objective = next((each for each in chosen if each.teacher != "none"), chosen[0])
    task = _task(config)
    teacher = functools.cache(lambda: Role("teacher", config, task, mesh, override))
    student = functools.cache(lambda: Role("student", config, task, mesh, override))
    made = {
        "teacher_train": lambda: teacher().train("teacher_train", OBJECTIVES["vanilla"]),
        "labelling": lambda: teacher().infer("labelling"),
        "student_train": lambda: student().train("student_train", objective),
        "evaluation": lambda: student().infer("evaluation"),
    }
    return (made[name]() for name in STEPS if name in names)


def _task(config: ExperimentConfig) -> Task:
    try:
        return get_task(config.task)
    except UserError as error:
        raise UserError(f"{error} (to compile without data, give --config.task.name=minireviews)") from error


def measure(step: Step, chip: Chip, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compiles a step; its row of the JSON, in which a step that does not fit has no cycles."""
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
        "parts": step.parts,
        "batch_shapes": len(step.row_sizes),
        "row_sizes": list(step.row_sizes),
    }
    try:
        program = step.function.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = cost.needed_when_out_of_memory(str(error))
        return row | {"hbm_gib": needed and needed / cost.GIB, "compiler": " ".join(str(error).split())[:500]}
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


def lines(row: Mapping[str, Any], chip: Chip) -> Iterator[str]:
    """What the terminal shows of a step."""
    sizes = "/".join(map(str, row["row_sizes"]))
    shapes = "1 shape" if row["batch_shapes"] == 1 else f"{row['batch_shapes']} shapes, this is the largest"
    per_chip = f"{row['rows_per_chip']} rows of {row['row_length']} tokens a chip"
    per_chip += f" in {row['parts']} parts" if row["parts"] > 1 else ""
    yield f"{row['step']}: {per_chip} (batches of {sizes} rows: {shapes})"
    needed = "more" if row["hbm_gib"] is None else f"{row['hbm_gib']:.2f} GiB"
    if "arguments_gib" not in row:
        yield f"  memory      does not fit: {needed} of {chip.memory:g} GiB; {row['compiler']}"
        return
    parts = ", ".join(f"{key} {row[f'{key}_gib']:.2f}" for key in ("arguments", "temporaries", "outputs", "code"))
    yield f"  memory      {needed} of {chip.memory:g} GiB: {'fits' if row['fits'] else 'does not fit'} ({parts})"
    total, limit = row["estimated_mcycles"], row["matmul_limit_mcycles"]
    if total is None:
        yield f"  warning: no cycles and collectives: {row['compiler']}"
        return
    yield (
        f"  cycles      {total:,.1f} M estimated, {row['estimated_milliseconds']:.1f} ms at {chip.clock:g} GHz; "
        f"matmul limit {limit:,.1f} M ({total / limit:.2f} ×)"
    )
    for name, count in row["groups"].items():
        yield f"  {count:>10,.2f}  {count / total:4.0%}  {name}"
    without = ", ".join(f"{count} {kind}" for kind, count in row["without_estimate"].items())
    if without:
        yield f"  not counted {row['ops_without_estimate']} ops without an estimate: {without}"
    if row["loops_of_unknown_length"]:
        yield f"  warning: {row['loops_of_unknown_length']} loops of unknown length are counted as if they turned once"
    moved = ", ".join(f"{kind} {amount / 2**20:,.2f} MiB" for kind, amount in row["collective_bytes"].items())
    yield f"  collectives {moved or 'none'}"


def main(argv: list[str]) -> None:
    """Parses the flags, compiles the steps, prints and writes what they take."""
    args, overrides = _parser().parse_known_args(argv)
    names = [name.strip() for name in args.steps.split(",")]
    for name in names:
        if name not in STEPS:
            raise UserError(f"--steps {name}: no such step{nearest(name, STEPS)}; there are {', '.join(STEPS)}")
    chip, config = chip_of(args.topology), settings.load(args.config, overrides)
    mesh = make_mesh(dataclasses.astuple(config.mesh), devices_of(args.topology))
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    terminal.log(f"{args.topology}: {mesh.devices.size} chips of {chip.memory:g} GiB · mesh {sizes}")
    rows: list[dict[str, Any]] = []
    _write(
        args.json, args.topology, mesh, rows
    )  # a place that cannot be written to is found before anything is compiled
    for step in steps(config, mesh, Override(args.rows_per_chip, args.row_length, args.unpacked), names):
        terminal.log(f"{step.name}: compiling, which takes a minute or two for a base encoder …")
        started = time.monotonic()
        rows.append(measure(step, chip, mesh) | {"compile_seconds": round(time.monotonic() - started, 1)})
        for line in lines(rows[-1], chip):
            terminal.log(line)
        _write(args.json, args.topology, mesh, rows)  # each time: an interruption costs no more than the step at hand
    if large := [row["step"] for row in rows if not row["fits"]]:
        raise UserError(
            f"{', '.join(large)}: more than the {chip.memory:g} GiB of a chip: lower batch_size or "
            "evaluation_batch_size, or set mesh.fsdp, accumulation or remat"
        )


def _write(path: Path | None, topology: str, mesh: jax.sharding.Mesh, rows: Sequence[Mapping[str, Any]]) -> None:
    if path is not None:
        report = {"topology": topology, "chips": mesh.devices.size, "steps": rows}
        storage.write_whole(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtransfer.precompile",
        description=__doc__.partition("\n")[0],
        epilog="Any setting of the config is a flag: --config.mesh.fsdp=8. Exit status 0: every step fits into a chip; "
        "1: one does not (the JSON is written all the same), or something is wrong with what was given.",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="an experiment, see configs/")
    parser.add_argument("--topology", required=True, metavar="NAME", help=f"chips, like {EXAMPLES}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="to be written, with one object for each step")
    parser.add_argument("--steps", default=",".join(STEPS), metavar="A,B", help="which ones (default: %(default)s)")
    parser.add_argument(
        "--rows-per-chip", type=_count, metavar="N", help="rows of a batch on each shard of data × fsdp"
    )
    parser.add_argument("--row-length", type=_count, metavar="S", help="tokens of a row")
    parser.add_argument("--unpacked", action="store_true", help="one text in a row")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_MOST:,}")
    return int(text)


if __name__ == "__main__":
    terminal.run(main)
