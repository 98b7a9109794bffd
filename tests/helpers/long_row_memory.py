"""Measure the memory of ModernBERT base on long rows, as the CPU's compiler reports it; nothing is run.

    python -m tests.helpers.long_row_memory

takes a minute, and prints the table in `xtransfer/models/hf/README.md`. Each row of it is a forward pass or a training
step, in float32, on one row of tokens.
"""

from pathlib import Path
from typing import Any

import jax

from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import empty_batch
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.models import visibility
from xtransfer.models.hf import config as hf_config
from xtransfer.models.inference import INPUTS
from xtransfer.runtime.sharding import make_mesh
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.inputs import plan_of

SHAPE = Path(__file__).resolve().parents[2] / "configs" / "shapes" / "modernbert-base"
LENGTHS = (512, 2048, 8192)
QUICK = {"xla_backend_optimization_level": 0}  # the buffers are the same


def temporaries(length: int, *, training: bool, longest_at_once: int) -> int:
    """Return the bytes of temporary arrays of one step on one row.

    Args:
      length: S.
      training: whether the step is a training step, or a forward pass.
      longest_at_once: the longest rows whose attention is computed at once, in tokens.
    """
    architecture = hf_config.read_config(SHAPE)
    settings = ModelConfig(max_length=length, batch_size=1, packed=False)
    compiled = CompiledSteps(settings, architecture, 2, make_mesh((1, 1, 1), jax.devices()[:1]))
    batch: Any = empty_batch(plan_of(settings, architecture, 1, 1), 1, 2)
    before, visibility.LONGEST_AT_ONCE = visibility.LONGEST_AT_ONCE, longest_at_once
    try:
        if training:
            step: Any = compiled.train_step(OBJECTIVES["vanilla"])
            lowered = step.lower(*compiled.training_arguments(batch))
        else:
            step = compiled.eval_step
            lowered = step.lower(compiled.abstract_params(), {name: batch[name] for name in INPUTS})
    finally:
        visibility.LONGEST_AT_ONCE = before
    return int(lowered.compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes)


def main() -> None:
    """Print the table: MiB of temporary arrays by length, with attention as it is, and with attention at once."""
    print("| tokens | forward | forward, at once | training step | training step, at once |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for length in LENGTHS:
        sizes = [
            temporaries(length, training=training, longest_at_once=longest)
            for training in (False, True)
            for longest in (512, max(LENGTHS))
        ]
        print(f"| {length:,} | " + " | ".join(f"{size / 2**20:,.0f} MiB" for size in sizes) + " |", flush=True)


if __name__ == "__main__":
    main()
