"""The plan of an experiment: its stages, their sizes, and roughly how long each will take.

The estimates combine a measured matrix product with known costs: a training step takes 6 FLOPs per parameter and token,
and a forward pass 2 (Kaplan et al., "Scaling Laws for Neural Language Models", 2020). They separate minutes from hours.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from xtransfer.config import ModelConfig
from xtransfer.runtime import processes

_EFFICIENCY = 0.33  # share of a bare matrix product's speed that a step reaches
_SIZE = 1024  # rows and columns of the matrices to measure


@dataclass(frozen=True)
class Machine:
    """The speed of this machine's devices.

    Attributes:
      flops: the float32 matrix products of all devices, in FLOP/s.
      step_seconds: the time of a training step with hardly any work.
      compile_seconds: the time to compile a training step.
    """

    flops: float
    step_seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class Stage:
    """One stage of an experiment.

    Attributes:
      name: what is trained, labelled, or scored.
      size: the amount of work, for people.
      seconds: the estimated time, or None if the stage is finished.
    """

    name: str
    size: str
    seconds: float | None


@dataclass(frozen=True)
class Work:
    """The work of one model.

    Attributes:
      parameters: the size of all matrices that multiply every token.
      tokens: the mean number of tokens per example.
    """

    parameters: int
    tokens: float

    def training_seconds(self, machine: Machine, steps: int, batch_size: int) -> float:
        """Return the time of `steps` steps of `batch_size` examples, without compiling."""
        flops = 6 * self.parameters * self.tokens * batch_size
        return steps * (machine.step_seconds + flops / (_EFFICIENCY * machine.flops))

    def inference_seconds(self, machine: Machine, examples: int) -> float:
        """Return the time of the forward pass over a number of examples."""
        return 2 * self.parameters * self.tokens * examples / (_EFFICIENCY * machine.flops)


def measure() -> Machine:
    """Measure a matrix product on one device, in well under a second, and scale it to all of them."""
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((_SIZE, _SIZE), jnp.float32)
    product(a).block_until_ready()
    start = time.perf_counter()
    repeats = 5
    for _ in range(repeats):
        product(a).block_until_ready()
    seconds = max((time.perf_counter() - start) / repeats, 1e-6)
    is_cpu = jax.devices()[0].platform == "cpu"
    # The virtual CPU devices of a process share its cores.
    devices = processes.count() if is_cpu else jax.device_count()
    return Machine(
        flops=devices * 2 * _SIZE**3 / seconds,
        step_seconds=0.03 if is_cpu else 0.002,
        compile_seconds=4.0 if is_cpu else 20.0,
    )


def length(steps: Sequence[int], settings: ModelConfig) -> str:
    """Return the length of training for people, such as "14 to 66 steps of 32 examples (epochs: 3)".

    Args:
      steps: the number of steps of each run of a stage.
      settings: the role's settings.
    """
    least, most = min(steps), max(steps)
    text = f"{least:,} to {most:,}" if least < most else f"{most:,}"
    epochs = f" (epochs: {settings.epochs:g})" if settings.epochs else ""
    return f"{text} steps of {settings.batch_size} examples{epochs}"


def lines(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield the plan, a line for each stage and one for the total."""
    names = max(len(stage.name) for stage in stages)
    sizes = max(len(stage.size) for stage in stages)
    yield "plan, with rough times:"
    for stage in stages:
        yield f"  {stage.name:<{names}}  {stage.size:<{sizes}}  {_duration(stage.seconds)}"
    yield f"  {'total':<{names}}  {'':<{sizes}}  {_duration(sum(stage.seconds or 0 for stage in stages))}"


def objective_lines(settings: Mapping[str, str]) -> Iterator[str]:
    """Yield the effective settings of the teacher and of every objective, given by name, a line for each."""
    longest = max(map(len, settings))
    yield "objectives, with their effective settings:"
    for name, text in settings.items():
        yield f"  {name:<{longest}}  {text}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "finished"
    if seconds < 90:
        return f"about {max(seconds if seconds < 10 else round(seconds, -1), 1):.0f} s"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
