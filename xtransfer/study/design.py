"""The design of a study: a base experiment, its variants, and the encoders that they need."""

import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xtransfer.errors import UserError

Flags = tuple[str, ...]
"""Changes to a config, each as "KEY=VALUE". "{NAME}" stands for the directory of a pretrained encoder."""


@dataclass(frozen=True)
class Study:
    """Variants of an experiment.

    Attributes:
      base: the config of the experiment, as FILE or FILE:ARG.
      variants: the repetitions of each variant, by its name. A repetition is its changes to the base.
      pretrained: the encoders to pretrain first, by name: a pretraining config and the changes to it.
    """

    base: str
    variants: Mapping[str, Sequence[Flags]]
    pretrained: Mapping[str, tuple[str, Flags]] = field(default_factory=dict)


def load(source: str) -> Study:
    """Return the study that `get_study` of a config file returns.

    Args:
      source: FILE or FILE:ARG.

    Raises:
      UserError: there is no such file, or it does not return a study.
    """
    path, _, arg = source.partition(":")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; --config takes FILE or FILE:ARG")
    try:
        functions = runpy.run_path(path)
        study = functions["get_study"](arg) if "get_study" in functions else None
    except Exception as error:  # the file is the user's program, so any exception is about the file
        raise UserError(f"{source}: {type(error).__name__}: {error}") from error
    if "get_study" not in functions:
        raise UserError(f"{path} has no function get_study; pass a study such as configs/studies/claim.py")
    if not isinstance(study, Study):
        raise UserError(f"{source}: get_study returned {type(study).__name__}, not a Study")
    return study
