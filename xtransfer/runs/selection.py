"""Selection protocols: which checkpoint of a run is reported. A new protocol is a new entry in `PROTOCOLS`.

In zero-shot transfer nothing from the target languages selects the checkpoint: the source language's dev split does, or
nothing at all. The oracle shows what that costs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from xtransfer.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class DevScores:
    """A run's dev scores by step, and in the target languages by language and step. Higher is better."""

    source: Mapping[int, float]
    targets: Mapping[str, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to select a checkpoint.

    Attributes:
      description: the protocol in words.
      zero_shot: whether it uses nothing from the target languages.
      choose: returns the selected step, or None if the run lacks the scores for it.
    """

    description: str
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
                raise CheckpointError(
                    f"step {step} has no dev result in {language}: no average is taken over fewer languages"
                )
    return _best({step: sum(values[step] for values in scores.targets.values()) for step in scores.source})


def _best(values: Mapping[int, float]) -> int:
    """Return the step with the highest value, and the earliest among equals."""
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
    """Return the step that each protocol selects among the checkpoints of one run.

    Args:
      source_dev: the metric on the source language's dev split by step, for every checkpoint.
      target_dev: the metric by language and step, if target languages have dev results.

    Returns:
      The step by protocol; ties go to the earliest step. "target_dev_oracle" only occurs with `target_dev`.

    Raises:
      UserError: no checkpoint, a NaN value, or a step without one of the target languages.
    """
    if not source_dev:
        raise CheckpointError("no dev result in the source language, so no checkpoint can be selected")
    scores = DevScores(source_dev, target_dev or {})
    for language, values in {"the source language": source_dev, **scores.targets}.items():
        for step, value in values.items():
            if value != value:
                raise CheckpointError(f"step {step}: the dev result in {language} is NaN")
    step_by_protocol = {name: protocol.choose(scores) for name, protocol in PROTOCOLS.items()}
    return {name: step for name, step in step_by_protocol.items() if step is not None}
