"""Names of topologies, and the errors for wrong ones."""

import importlib.util
import os
from collections.abc import Iterator

import jax
import pytest
from jax.experimental import topologies

from xtransfer.errors import UserError
from xtransfer.precompile import topology


@pytest.fixture(autouse=True)
def restore_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo libtpu's settings after each test, and pretend that libtpu is installed."""
    for key in topology._ENVIRONMENT:
        monkeypatch.setenv(key, "any")  # so that the variable is restored to its value before the test
        monkeypatch.delenv(key)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    jax.devices()
    jax.config.update("jax_platforms", "")  # JAX already has its devices, so only the tests below see this
    yield
    jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize(("name", "peak"), [("v5e:2x4", 197), ("v5p:2x2x2", 459), ("v6e:4x4", 918)])
def test_peak_is_the_published_one(name: str, peak: float) -> None:
    chip = topology.chip_of(name)
    assert chip.flops_per_cycle * chip.clock / 1000 == pytest.approx(peak, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "hint"), [("v5:2x4", "did you mean 'v5"), ("V5E:2x4", "did you mean 'v5e'"), ("", "choose from v5e, v5p")]
)
def test_unknown_chip(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"--topology {name}: no such chip; choose one like v5e:2x4.*{hint}"):
        topology.chip_of(name)


@pytest.mark.parametrize("shape", ["", ":", ":2", ":0x4", ":2x0", ":2x4x", ":x", ":2x2x2x2", ":2X4", ":02x4"])
def test_malformed_shapes_that_would_crash_libtpu(shape: str) -> None:
    with pytest.raises(
        UserError, match=f"--topology v5e{shape}: its shape is missing or malformed; choose one like v5e:2x4"
    ):
        topology.chip_of(f"v5e{shape}")


def test_libtpu_is_set_up_for_absent_chips_but_a_tpu_machine_keeps_its_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = []

    def get_topology_desc(**request: str) -> topologies.TopologyDescription:
        requests.append(
            (request, os.environ["TPU_SKIP_MDS_QUERY"], os.environ["TPU_WORKER_ID"], jax.config.jax_platforms)
        )
        return topologies.TopologyDescription(jax.devices()[:3])

    monkeypatch.setattr(topologies, "get_topology_desc", get_topology_desc)
    monkeypatch.setenv("TPU_WORKER_ID", "7")
    assert topology.devices_of("v5e:2x4") == jax.devices()[:3]
    assert requests == [({"platform": "tpu", "topology_name": "v5e:2x4"}, "1", "7", "cpu")]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "ABORTED: Internal error when accessing libtpu multi-process lockfile.",
            "another process is using libtpu; wait",
        ),
        ('INVALID_ARGUMENT: Topology layout "v5e:3x7"\nis not divisible', "--topology v5e:3x7: INVALID.*like v5e:2x4"),
        ("JAX TPU support not installed", "--topology v5e:3x7: JAX TPU support not installed"),
    ],
)
def test_libtpus_errors_become_one_line(monkeypatch: pytest.MonkeyPatch, message: str, expected: str) -> None:
    def fail(**_: str) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=expected) as caught:
        topology.devices_of("v5e:3x7")
    assert "\n" not in str(caught.value)


def test_missing_libtpu_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.* is not installed; run .*jax\[tpu\].*XTRANSFER_EXTRAS=tpu"):
        topology.devices_of("v5e:2x4")
