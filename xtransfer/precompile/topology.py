"""Look up TPU topologies by name: their chips, and devices to compile for on a machine without TPUs."""

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from xtransfer.errors import BusyError, ConfigError, MachineError, nearest, one_line

# This JAX may be unable to read the programs of a newer libtpu.
FITTING_LIBTPU = f"pip install 'jax[tpu]=={jax.__version__}'"
EXAMPLES = "v5e:2x4, v5e:16x16, v5p:2x2x2, v6e:2x4, v6e:4x4"

# Settings to compile for absent chips. The first two stop libtpu from searching for chips and from taking the lock that
# protects their use. The rest stops it from complaining that this is not a TPU machine, whose own values would win.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclass(frozen=True)
class Chip:
    """A generation of TPU chips.

    Attributes:
      memory: HBM, in GiB.
      clock: the clock rate, in GHz.
      flops_per_cycle: bf16 operations per cycle of all matrix units.

    Sources: cloud.google.com/tpu/docs/v5e (16 GB, 197 Tflop/s: 4 units of 128 × 128 at 1.5 GHz), /v5p (95 GB, 459: 8 of
    128 × 128 at 1.75 GHz), and /v6e (32 GB, 918: 4 of 256 × 256 at 1.75 GHz). Each cell of a unit does two operations.
    """

    memory: float
    clock: float
    flops_per_cycle: int


CHIPS = {
    "v5e": Chip(16, 1.5, 4 * 128 * 128 * 2),
    "v5p": Chip(95, 1.75, 8 * 128 * 128 * 2),
    "v6e": Chip(32, 1.75, 4 * 256 * 256 * 2),
}


def devices_of(topology: str) -> list[Any]:
    """Return the chips of a topology, to build a mesh from and compile for. JAX itself then runs on the CPU.

    Call this before JAX has looked for devices.

    Raises:
      UserError: libtpu does not know the topology, is not installed, or is in use.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MachineError(
            "libtpu, which compiles for TPUs on any Linux machine, is not installed; run "
            f"{FITTING_LIBTPU}, or XTRANSFER_EXTRAS=tpu launch/test.sh --version"
        )
    from jax.experimental import topologies

    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        message = one_line(error, limit=1000)
        if "lockfile" in message:
            raise BusyError(f"another process is using libtpu; wait for it to end ({message[:150]})") from error
        raise ConfigError(f"--topology {topology}: {message[:200]}; choose one like {EXAMPLES}") from error


def chip_of(topology: str) -> Chip:
    """Return the kind of chip of a topology, by its name."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        hint = nearest(name.lower(), CHIPS) or f"; choose from {', '.join(CHIPS)}"
        raise ConfigError(f"--topology {topology}: no such chip; choose one like {EXAMPLES}{hint}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise ConfigError(f"--topology {topology}: its shape is missing or malformed; choose one like {EXAMPLES}")
    return CHIPS[name]
