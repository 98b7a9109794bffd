"""Set up every test: eight virtual CPU devices, no network, no display, and the same hypothesis examples each time."""

import gc
import os
import signal
from pathlib import Path

from tests.helpers.compilation import DEVICES, QUICK_COMPILE

# Set these before JAX, Hugging Face's packages, or matplotlib are imported. Subprocesses of the tests inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES} {QUICK_COMPILE}".strip()
# The tests and their subprocesses compile many programs more than once, most of them small.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from xtransfer.runtime import processes  # noqa: E402

# Steps in flight together on eight virtual devices can wait for each other's threads until XLA aborts.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# The first example of a jitted function pays for its compilation, so a deadline would measure the compiler.
hypothesis.settings.register_profile("xtransfer", deadline=None, derandomize=True)
hypothesis.settings.load_profile("xtransfer")


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    """Undo what a command that runs inside a test sets for the whole process."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def default_ctrl_c():
    """Handle Ctrl-C as usual; a process started in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_xdist_auto_num_workers() -> int:
    """Use one worker more than there are cores, because many tests wait for other processes."""
    return processes.cores() + 1


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drop the compiled programs of earlier modules once they take much memory."""
    yield
    if resident_bytes() > 2 * 2**30:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    """Return the memory of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from what the imports created. That took a tenth of an experiment's time."""
    gc.collect()
    gc.freeze()
