"""Draws: repetitions of an experiment with another labelled sample, and a teacher trained on it.

    seeds                                     the heads, batches, and dropout of students, within each draw
    task.labelled_seeds and teacher_seeds     the draws

The two tuples are paired and not crossed. A user has one sample of labels and trains one teacher on it, so one pair is
one observation of what a user may get, and n pairs give the mean an interval with n − 1 degrees of freedom. The cells
of a product would share samples and teachers. They would cost n × m teachers, and say hardly more than the smaller of
the two numbers.

A draw is the experiment with its two seeds, bit for bit. All draws therefore use the same `seeds`, and without
`teacher_seeds` the same seed of the teacher. What such a seed adds to every draw is in no interval over draws.

The draw of `task.labelled_seed` and `teacher_seed` is the default draw. Its runs are at the top of the workdir. Every
other draw has a directory `draws/<name>/`. Its name consists of its seeds, so the tuples may grow, shrink, and change
their order.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from xtransfer.config import ExperimentConfig
from xtransfer.runs.workdir import DEFAULT_DRAW

_NAME = re.compile(r"sample-(0|[1-9]\d*)-teacher-(0|[1-9]\d*)")


@dataclass(frozen=True)
class Draw:
    """A labelled sample with its teacher.

    Attributes:
      name: its name in the workdir and in result rows.
      labelled_seed: the seed of the labelled and the unlabelled sample.
      teacher_seed: the seed of the teacher's training.
    """

    name: str
    labelled_seed: int
    teacher_seed: int

    def apply(self, config: ExperimentConfig) -> ExperimentConfig:
        """Return the config of this draw alone."""
        task = replace(config.task, labelled_seed=self.labelled_seed, labelled_seeds=())
        return replace(config, task=task, teacher_seed=self.teacher_seed, teacher_seeds=())


def draws_of(config: ExperimentConfig) -> tuple[Draw, ...]:
    """Return the draws of an experiment, in the order of the config."""
    samples, teachers = config.task.labelled_seeds, config.teacher_seeds
    count = max(len(samples), len(teachers), 1)
    pairs = zip(
        samples or (config.task.labelled_seed,) * count, teachers or (config.teacher_seed,) * count, strict=True
    )
    return tuple(_draw(config, *pair) for pair in pairs)


def named(config: ExperimentConfig, name: str) -> Draw | None:
    """Return the draw of a name, whether the config asks for it now or not; None if there can be no such draw."""
    if name == DEFAULT_DRAW:
        return _draw(config, config.task.labelled_seed, config.teacher_seed)
    match = _NAME.fullmatch(name)
    draw = _draw(config, int(match[1]), int(match[2])) if match else None
    return draw if draw is not None and draw.name == name else None


def name_in(config: ExperimentConfig, draw: Draw) -> str:
    """Return the name that a draw of another experiment has in this one, where another draw may be the default.

    If a sample holds all examples, its seed makes no difference.
    """
    is_sample = config.task.has_samples
    return _draw(config, draw.labelled_seed if is_sample else config.task.labelled_seed, draw.teacher_seed).name


def order(name: str) -> tuple[int, ...]:
    """Return the sort key of a draw's name: the default draw comes first, and the others follow by their seeds."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else ()


@dataclass(frozen=True)
class Axis:
    """What a mean, its ±, and its interval go over.

    Attributes:
      units: the units that vary, in the plural.
      detail: what every unit has of its own, or shares with the others; it follows `units`.
    """

    units: str
    detail: str

    def over(self, count: int) -> str:
        """Return the number of units, and what they have and share."""
        return f"{count:,} {self.units}{self.detail}"


SEEDS = Axis("seeds", "; one labelled sample and one teacher")
SAMPLES = Axis("labelled samples", ", each with its own teacher")
UNLABELLED_SAMPLES = Axis("unlabelled samples", ", each with its own teacher")
TEACHERS = Axis("teachers", " of one labelled sample")
OVERLAPPING = Axis("draws", ", some of which share a labelled sample or a teacher, so intervals are too narrow")


def axis(config: ExperimentConfig, names: Iterable[str]) -> Axis:
    """Return what differs between the runs of some draws of an experiment."""
    draws = [draw for name in set(names) if (draw := named(config, name)) is not None]
    if len(draws) < 2:
        return SEEDS
    samples, teachers = ({getattr(draw, key) for draw in draws} for key in ("labelled_seed", "teacher_seed"))
    if len(samples) == 1 or not config.task.has_samples:
        return TEACHERS
    if len(samples) < len(draws) or (not config.task.labelled and len(teachers) < len(draws)):
        return OVERLAPPING  # of two starts with other tuples, as `ExperimentConfig` refuses such a one
    return SAMPLES if config.task.labelled else UNLABELLED_SAMPLES


def _draw(config: ExperimentConfig, labelled_seed: int, teacher_seed: int) -> Draw:
    is_default = (labelled_seed, teacher_seed) == (config.task.labelled_seed, config.teacher_seed)
    name = DEFAULT_DRAW if is_default else f"sample-{labelled_seed}-teacher-{teacher_seed}"
    return Draw(name, labelled_seed, teacher_seed)
