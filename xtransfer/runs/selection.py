"""Selection protocols: which weights of a run are reported. A new protocol is a new entry in `PROTOCOLS`.

In zero-shot transfer nothing from the target languages selects the checkpoint: the source language's dev split does, or
nothing at all. The oracle shows what that costs: Keung, Lu, Salazar, and Bhardwaj, "Don't Use English Dev: On the
Zero-Shot Cross-Lingual Evaluation of Contextual Embeddings", EMNLP 2020. Averaging checkpoints does without a dev
split: Schmidt, Vulić, and Glavaš, "Free Lunch: Robust Cross-Lingual Transfer via Model Checkpoint Averaging", ACL 2023.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from xtransfer.errors import CheckpointError
from xtransfer.train.checkpoints import AVERAGE, PARAMS


@dataclasses.dataclass(frozen=True)
class DevScores:
    """The dev scores of a run's checkpoints. Higher is better.

    Attributes:
      source: the score on source dev by step, for every checkpoint; of several source languages, the mean over them.
      targets: the score on each target language's dev split by language and step, and on those of several source
        languages; empty without an oracle.
      averaged: the steps whose checkpoints hold an average.
      has_dev: whether the source language has a dev split. Without one, every score is 0, and nothing is selected.
    """

    source: Mapping[int, float]
    targets: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    averaged: Collection[int] = ()
    has_dev: bool = True


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way to select the weights of a run.

    Attributes:
      description: the protocol in words.
      choose: returns the selected step for a language, or None if the run lacks what the protocol needs. Without a
        language it is for all of them.
      zero_shot: whether it uses nothing from the target languages.
      per_language: whether it may select another step for every language.
      item: the item of the checkpoint with the weights, `PARAMS` or `AVERAGE`.
      for_several: the protocol in words if there are several source languages; "" = no other ones.
    """

    description: str
    choose: Callable[[DevScores, str | None], int | None]
    zero_shot: bool = True
    per_language: bool = False
    item: str = PARAMS
    for_several: str = ""

    def text(self, num_sources: int) -> str:
        """Return the protocol in words, for a number of source languages."""
        return (num_sources > 1 and self.for_several) or self.description


def _source_dev(scores: DevScores, language: str | None) -> int | None:
    return _best(scores.source) if scores.has_dev else max(scores.source)


def _last(scores: DevScores, language: str | None) -> int | None:
    return max(scores.source)


def _average(scores: DevScores, language: str | None) -> int | None:
    last = max(scores.source)
    return last if last in scores.averaged else None


def _target_dev(scores: DevScores, language: str | None) -> int | None:
    if language is None or not scores.targets:
        return None
    return _best(scores.targets.get(language, scores.source))  # the source language has its own dev split


def _best(values: Mapping[int, float]) -> int:
    """Return the step with the highest value, and the earliest among equals."""
    return min(values, key=lambda step: (-values[step], step))


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "source_dev": Protocol(
            "best on the source language's dev split",
            _source_dev,
            for_several="best on the dev splits of the source languages, by the mean over them",
        ),
        "last": Protocol("last checkpoint", _last),
        "average": Protocol("average of the last checkpoints", _average, item=AVERAGE),
        "target_dev": Protocol(
            "best on each language's own dev split: an oracle, not zero-shot",
            _target_dev,
            zero_shot=False,
            per_language=True,
        ),
    }
)


def choose(scores: DevScores, language: str | None = None) -> dict[str, int]:
    """Return the step that each protocol selects among the checkpoints of one run.

    Args:
      scores: the run's scores.
      language: the language to classify. Without it, protocols that select a step for each language are left out.

    Returns:
      The step by protocol; ties go to the earliest step. A protocol for which the run lacks something is left out.

    Raises:
      UserError: no checkpoint, a NaN value, or a step without one of the target languages.
    """
    if not scores.source:
        raise CheckpointError("no dev result in the source language, so no checkpoint can be selected")
    for name, values in {"the source language": scores.source, **scores.targets}.items():
        for step in sorted(scores.source):
            if step not in values:
                raise CheckpointError(f"step {step} has no dev result in {name}, so no best checkpoint can be selected")
            if values[step] != values[step]:
                raise CheckpointError(f"step {step}: the dev result in {name} is NaN")
    step_by_protocol = {name: protocol.choose(scores, language) for name, protocol in PROTOCOLS.items()}
    return {name: step for name, step in step_by_protocol.items() if step is not None}


def weights_name(step: int, item: str) -> str:
    """Return the name of an item's weights in the workdir: "40" for the parameters of step 40, or "40-average"."""
    return str(step) if item == PARAMS else f"{step}-{item}"
