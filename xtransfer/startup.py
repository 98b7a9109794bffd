"""What a command does before it imports its libraries, which takes seconds: Ctrl-C, garbage, and the variables of JAX.

Only the standard library is imported here, because the package itself imports this module.
"""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

# Settings of JAX that the environment may change, with which the same run would fail or give other numbers.
SEMANTICS = {
    "jax_debug_infs": False,
    "jax_debug_nans": False,
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_jit": False,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_transfer_guard": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_transfer_guard_host_to_device": None,
}

_DEFAULTS = {False: ("", "0", "n", "no", "f", "false", "off"), True: ("1", "y", "yes", "t", "true", "on")}
_INTERRUPTED = 130  # `errors.Exit.INTERRUPTED`
_removed: list[str] = []


def is_command(argv: Sequence[str], package: str) -> bool:
    """Return whether Python was started with -m and a module of a package; `argv` is `sys.orig_argv`."""
    module = argv[argv.index("-m") + 1 :][:1] if "-m" in argv else []
    return bool(module) and (module[0] == package or module[0].startswith(f"{package}."))


def prepare() -> None:
    """End the process at Ctrl-C without a traceback until `terminal.run` handles it, and remove variables of JAX.

    Imports leave almost no garbage, so none is collected until `imported`.
    """
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    _remove_variables()


def imported() -> None:
    """Collect garbage from now on, but never look for it again among what `prepare` let the imports create."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def removed_variables() -> list[str]:
    """Remove the variables that would change the numbers, and return the names of all that were removed so far.

    JAX reads them when it is imported. If that has happened, its settings are set back.
    """
    _remove_variables()
    names = [*_removed]
    _removed.clear()
    if names and "jax" in sys.modules:
        import jax

        for name in names:
            jax.config.update(name.lower(), SEMANTICS[name.lower()])
    return names


def _remove_variables() -> None:
    for name, default in SEMANTICS.items():
        value = os.environ.pop(name.upper(), None)
        same = _DEFAULTS[default] if isinstance(default, bool) else ("" if default is None else str(default),)
        if value is not None and value.lower() not in same:
            _removed.append(name.upper())


def _end(*_: Any) -> None:
    os.write(2, b"interrupted: nothing had started\n")
    os._exit(_INTERRUPTED)
