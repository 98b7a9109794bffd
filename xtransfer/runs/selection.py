"""Which checkpoint of a run is reported. A new protocol is a new entry in `PROTOCOLS`.

Zero-shot means that nothing of the target languages chose the checkpoint: only the source
language's dev split, or nothing at all. The oracle tells how much that costs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from xtransfer.errors import UserError


@dataclasses.dataclass(frozen=True)
class DevScores:
    """Dev values of one run, higher is better: step -> value, for targets by language."""

    source: Mapping[int, float]
    targets: Mapping[str, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How to choose, in words and as a function; None where the run lacks what it needs."""

    describe: str
    zero_shot: bool
    choose: Callable[[DevScores], int | None]


def _source_dev(scores: DevScores) -> int | None:
    return _best(scores.source)


def _last(scores: DevScores) -> int | None:
    return max(scores.source)


def _target_dev_oracle(scores: DevScores) -> int | None:
    if not scores.targets:
        return None
    for language, values in scores.targets.items():
        for step in sorted(scores.source):
            if step not in values:
                raise UserError(
                    f"step {step} has no dev result in {language}: an average is never over fewer languages"
                )
    return _best({step: sum(values[step] for values in scores.targets.values()) for step in scores.source})


def _best(values: Mapping[int, float]) -> int:
    """The step with the highest value; the earliest of equals."""
    return min(values, key=lambda step: (-values[step], step))


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "source_dev": Protocol("best on the source language's dev split", True, _source_dev),
        "last": Protocol("last checkpoint", True, _last),
        "target_dev_oracle": Protocol(
            "best on the target languages' dev splits: an oracle, not zero-shot", False, _target_dev_oracle
        ),
    }
)


def choose(
    source_dev: Mapping[int, float], target_dev: Mapping[str, Mapping[int, float]] | None = None
) -> dict[str, int]:
    """The step that each protocol chooses among the checkpoints of one run.

    Args:
      source_dev: step -> the metric on the source language's dev split, for every checkpoint.
      target_dev: language -> step -> the metric, where target languages have dev results.

    Returns:
      protocol -> step; ties go to the earliest step. "target_dev_oracle" only with `target_dev`.

    Raises:
      UserError: no checkpoint at all, a value that is NaN, or a step without one of the target languages.
    """
    if not source_dev:
        raise UserError("no dev result in the source language: no checkpoint can be chosen")
    scores = DevScores(source_dev, target_dev or {})
    for language, values in {"the source language": source_dev, **scores.targets}.items():
        for step, value in values.items():
            if value != value:
                raise UserError(f"step {step}: the dev result in {language} is NaN")
    chosen = {name: protocol.choose(scores) for name, protocol in PROTOCOLS.items()}
    return {name: step for name, step in chosen.items() if step is not None}
