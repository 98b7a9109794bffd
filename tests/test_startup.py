"""The first seconds of a command: Ctrl-C, and variables that would change the numbers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from xtransfer import startup
from xtransfer.errors import Exit
from xtransfer.runtime import terminal

ODD = {"jax_numpy_dtype_promotion": "strict", "jax_default_prng_impl": "rbg", "jax_numpy_rank_promotion": "raise"}
ODD |= {"jax_random_seed_offset": 7, "jax_default_matmul_precision": "bfloat16", "jax_threefry_partitionable": False}


@pytest.mark.parametrize("name", startup.SEMANTICS)
def test_variables_that_change_the_numbers_are_ignored_and_named(monkeypatch, capsys, name):
    import jax

    odd = ODD.get(name, "disallow" if "guard" in name else True)
    monkeypatch.setenv(name.upper(), str(odd))
    before = getattr(jax.config, name)
    jax.config.update(name, odd)  # as JAX does on import
    try:
        terminal.run(lambda argv: print(getattr(jax.config, name)))
    finally:
        jax.config.update(name, before)
    expected = f"warning: {name.upper()} is ignored, because it would change the results\n{startup.SEMANTICS[name]}\n"
    assert capsys.readouterr().out == expected


def test_variables_with_their_defaults_are_not_worth_a_word(monkeypatch, capsys):
    for name, value in {"JAX_ENABLE_X64": "False", "JAX_THREEFRY_PARTITIONABLE": "1", "JAX_DEBUG_NANS": "0"}.items():
        monkeypatch.setenv(name, value)
    terminal.run(lambda argv: None)
    assert capsys.readouterr().out == ""


def command(*arguments: str, **variables: str) -> list:
    return [sys.executable, "-m", "xtransfer.describe", *arguments], os.environ | variables


def test_values_that_jax_refuses_do_not_end_a_command():
    arguments, environment = command("--config", "none.py", JAX_ENABLE_X64="maybe", JAX_NUMPY_DTYPE_PROMOTION="foo")
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.returncode == Exit.CONFIG and "Traceback" not in result.stderr
    assert "warning: JAX_ENABLE_X64 is ignored" in result.stdout
    assert "warning: JAX_NUMPY_DTYPE_PROMOTION is ignored" in result.stdout


@pytest.mark.parametrize("module", ["xtransfer.main", "xtransfer.predict"])
@pytest.mark.parametrize("delay", [0.2, 0.5, 1.0])
def test_ctrl_c_during_imports_ends_a_command_without_a_trace(module, delay, default_ctrl_c):
    process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", module], stderr=subprocess.PIPE, text=True)
    # The package is imported first, so from its first line on the handler is about to be there.
    for line in process.stderr:
        if line.rstrip().endswith("xtransfer"):
            break
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    output = [line for line in process.communicate()[1].splitlines() if not line.startswith("import time:")]
    assert (process.returncode, output) == (Exit.INTERRUPTED, ["interrupted: nothing had started"])


def test_garbage_is_collected_after_the_imports_and_not_among_them():
    code = """
import gc
from xtransfer import startup
startup.prepare()
from xtransfer.runtime import terminal
assert not gc.isenabled() and not gc.get_freeze_count()
terminal.run(lambda argv: print(gc.isenabled(), gc.get_freeze_count() > 10_000))
before = gc.get_freeze_count()
terminal.run(lambda argv: print(gc.get_freeze_count() == before))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "True True\nTrue\n"


def test_a_script_that_imports_the_package_keeps_its_own_handling_of_ctrl_c(default_ctrl_c):
    code = "import signal, xtransfer; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert startup.is_command(["python", "-m", "xtransfer.main"], "xtransfer")
    assert startup.is_command(["python", "-X", "dev", "-m", "xtransfer"], "xtransfer")
    for argv in (["python", "-m", "pytest"], ["python", "-m", "xtransfers.main"], ["python", "xtransfer.py"], ["-m"]):
        assert not startup.is_command(argv, "xtransfer")
