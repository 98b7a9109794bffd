"""The evaluate command on a different number of devices from training."""

import pytest

from xtransfer.config import ExperimentConfig, MeshConfig
from xtransfer.evaluate.opening import fit_devices


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(8), MeshConfig(0, 4), MeshConfig(2, 2, 2)])
def test_a_mesh_that_fits_is_kept(mesh: MeshConfig, capsys: pytest.CaptureFixture) -> None:
    assert fit_devices(ExperimentConfig(mesh=mesh)).mesh == mesh
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mesh", [MeshConfig(256), MeshConfig(0, 16), MeshConfig(0, 3), MeshConfig(1, 2, 2)])
def test_a_mesh_that_does_not_fit_is_replaced_with_a_notice(mesh: MeshConfig, capsys: pytest.CaptureFixture) -> None:
    assert fit_devices(ExperimentConfig(seeds=(7,), mesh=mesh)) == ExperimentConfig(seeds=(7,))
    assert "does not fit the 8 device(s) here" in capsys.readouterr().out
