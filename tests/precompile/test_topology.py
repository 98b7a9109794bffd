"""Names of topologies, and what is said of those that are not."""

import importlib.util
import os
from collections.abc import Iterator

import jax
import pytest
from jax.experimental import topologies

from xtransfer.errors import UserError
from xtransfer.precompile import topology


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is set for libtpu is the process's, and libtpu is taken for installed."""
    for key in topology._ENVIRONMENT:
        monkeypatch.setenv(key, "here")
        monkeypatch.delenv(key)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    jax.devices()
    jax.config.update("jax_platforms", "")  # its devices are there: this says only what is found here afterwards
    yield
    jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize(("name", "peak"), [("v5e:2x4", 197), ("v5p:2x2x2", 459), ("v6e:4x4", 918)])
def test_chips_reach_their_published_tflops(name: str, peak: float) -> None:
    chip = topology.chip_of(name)
    assert chip.flops_per_cycle * chip.clock / 1000 == pytest.approx(peak, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "hint"), [("v5:2x4", "did you mean 'v5"), ("V5E:2x4", "did you mean 'v5e'"), ("", "choose from v5e, v5p")]
)
def test_a_kind_of_chip_that_there_is_not(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"--topology {name}: no such chip; choose one like v5e:2x4.*{hint}"):
        topology.chip_of(name)


@pytest.mark.parametrize("shape", ["", ":", ":2", ":0x4", ":2x0", ":2x4x", ":x", ":2x2x2x2", ":2X4", ":02x4"])
def test_sides_that_libtpu_would_die_of(shape: str) -> None:
    with pytest.raises(UserError, match="its sides are missing, as in v5e:2x4"):
        topology.chip_of(f"v5e{shape}")


def test_libtpu_is_told_that_there_are_no_tpus_and_a_tpu_machines_values_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def described(**request: str) -> topologies.TopologyDescription:
        asked.append((request, os.environ["TPU_SKIP_MDS_QUERY"], os.environ["TPU_WORKER_ID"], jax.config.jax_platforms))
        return topologies.TopologyDescription(jax.devices()[:3])

    monkeypatch.setattr(topologies, "get_topology_desc", described)
    monkeypatch.setenv("TPU_WORKER_ID", "7")
    assert topology.devices_of("v5e:2x4") == jax.devices()[:3]
    assert asked == [({"platform": "tpu", "topology_name": "v5e:2x4"}, "1", "7", "cpu")]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "another process uses libtpu; wait"),
        ('INVALID_ARGUMENT: Topology layout "v5e:3x7"\nis not divisible', "--topology v5e:3x7: INVALID.*like v5e:2x4"),
        ("JAX TPU support not installed", "--topology v5e:3x7: JAX TPU support not installed"),
    ],
)
def test_what_libtpu_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, message: str, said: str) -> None:
    def refuse(**_: str) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=said) as caught:
        topology.devices_of("v5e:3x7")
    assert "\n" not in str(caught.value)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, .* is missing.*jax\[tpu\].*XTRANSFER_EXTRAS=tpu"):
        topology.devices_of("v5e:2x4")
