"""The design of a study: a base experiment, its variants, and the encoders that they need."""

import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xtransfer.config import split_source
from xtransfer.errors import ConfigError

_NAME = re.compile(r"\w[\w .=,+-]{0,99}")  # becomes a directory

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
    path, arg = split_source(source)
    try:
        functions = runpy.run_path(path)
        study = functions["get_study"](arg) if "get_study" in functions else None
    except Exception as error:  # the file is the user's program, so any exception is about the file
        raise ConfigError(f"{source}: {type(error).__name__}: {error}") from error
    if "get_study" not in functions:
        raise ConfigError(f"{path} has no function get_study; pass a study such as configs/studies/claim.py")
    if not isinstance(study, Study):
        raise ConfigError(f"{source}: get_study returned {type(study).__name__}, not a Study")
    _check(source, study)
    return study


def _check(source: str, study: Study) -> None:
    """Refuse names that cannot be directories, and variants without a repetition."""
    for name in (*study.variants, *study.pretrained):
        is_taken = name == "pretrained" and name in study.variants  # the folder of the encoders
        if not _NAME.fullmatch(name) or is_taken or name.endswith(".work"):
            raise ConfigError(
                f"{source}: {name!r} cannot be the name of a variant or an encoder; use letters and digits"
            )
    for name, repetitions in study.variants.items():
        if not repetitions:
            raise ConfigError(f"{source}: variant {name!r} has no repetition")


def with_directories(flags: Flags, directories: Mapping[str, Path]) -> list[str]:
    """Return flags of the command line, with the directory of each encoder in place of its name in braces."""
    lines = []
    for flag in flags:
        for name, directory in directories.items():
            flag = flag.replace(f"{{{name}}}", str(directory))
        lines.append(f"--config.{flag}")
    return lines


def encoders_of(study: Study, names: Sequence[str]) -> list[str]:
    """Return the encoders that some variants use, and those that their recipes use, in the order of the study."""
    flags = [flag for name in names for repetition in study.variants[name] for flag in repetition]
    used: set[str] = set()
    while more := {name for name in study.pretrained if any(f"{{{name}}}" in flag for flag in flags)} - used:
        used |= more
        flags += [flag for name in more for flag in study.pretrained[name][1]]
    return [name for name in study.pretrained if name in used]
