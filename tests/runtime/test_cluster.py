"""How a run finds its processes: flags, and the environment variables of clusters."""

import argparse
import socket
import threading

import pytest

from xtransfer.errors import UserError
from xtransfer.runtime import cluster
from xtransfer.runtime.cluster import Flags

THREE = ("--coordinator", "10.0.0.1:1234", "--processes", "4", "--process", "3")
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def flags(*argv):
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    return cluster.parse_flags(parser.parse_args(argv))


def test_flags_describe_the_group():
    parsed = flags(*THREE, "--start-timeout", "5")
    assert parsed == Flags("10.0.0.1:1234", 4, 3, start_timeout=5.0)
    assert (parsed.host, parsed.port) == ("10.0.0.1", 1234)
    ipv6 = flags("--coordinator", "[::1]:99", "--processes", "1", "--process", "0")
    assert (ipv6.host, ipv6.port) == ("::1", 99)
    assert flags() == Flags() and flags().coordinator == "" and flags().stall_timeout is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--coordinator", "a:1"], "--processes, --process missing"),
        (["--processes", "2", "--process", "0"], "--coordinator missing"),
        (["--process", "0"], "--coordinator, --processes missing"),
        ([*THREE[2:], "--coordinator", "host"], "--coordinator host: expected HOST:PORT"),
        ([*THREE[2:], "--coordinator", ":80"], "--coordinator :80: expected HOST:PORT"),
        ([*THREE[2:], "--coordinator", "a:65536"], "a port from 1 to 65535"),
        ([*THREE[:4], "--process", "4"], "--process is 4: expected 0 to 3 for 4 processes"),
        ([*THREE[:4], "--process", "-1"], "--process is -1"),
        ([*THREE[:2], "--processes", "0", "--process", "0"], "--processes is 0"),
        (["--stall-timeout", "-1"], "--stall-timeout is -1"),
        (["--start-timeout", "nan"], "--start-timeout is nan"),
    ],
)
def test_invalid_flags_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        flags(*argv)


@pytest.fixture
def tpu(monkeypatch, tmp_path):
    """Simulate a machine with TPUs and libtpu whose metadata server names no workers."""
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cluster, "_TPU_DEVICES", (str(tmp_path / "accel0"),))
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cluster, "_tpu_workers", lambda: "")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # a batch script without srun
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),  # a shell in a four-task allocation
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # without TPUs
    ],
)
def test_clusters_are_detected_without_tpus(monkeypatch, environment, expected):
    monkeypatch.setattr(cluster, "_TPU_DEVICES", ())
    assert cluster.in_cluster(environment) is expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, True),
        ({"MEGASCALE_NUM_SLICES": "1", "TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}, True),
    ],
)
def test_clusters_are_detected_with_tpus(tpu, environment, expected):
    assert cluster.in_cluster(environment) is expected


def test_pod_workers_come_from_the_metadata_server(tpu, monkeypatch):
    monkeypatch.setattr(cluster, "_tpu_workers", lambda: "x:0:10.0.0.2,y:1:10.0.0.3")
    assert cluster.in_cluster({})
    assert not cluster.in_cluster({"TPU_SKIP_MDS_QUERY": "1"})
    monkeypatch.setattr(cluster, "_tpu_workers", lambda: "x:0:10.0.0.2")
    assert not cluster.in_cluster({})


def test_task_count_of_a_step_overrides_its_jobs():
    assert cluster.slurm_tasks(SLURM) == 2
    assert cluster.slurm_tasks(SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "3"}) == 3
    assert cluster.slurm_tasks({"SLURM_STEP_NUM_TASKS": "3"}) is None


@pytest.mark.parametrize(
    "name", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"]
)
@pytest.mark.parametrize("value", ["", "2 tasks", "-1", "1.5", "²"])
def test_malformed_slurm_variables_are_named(name, value):
    with pytest.raises(UserError, match=f"^{name} is '{value}', but SLURM sets a number: "):
        cluster.in_cluster(SLURM | {name: value})


@pytest.mark.parametrize(
    ("tasks", "expected"), [("1", [0, 1, 2]), ("1(x4)", [0, 1, 2]), ("3", None), ("3(x4)", None), ("1,2", None)]
)
def test_only_task_of_a_node_gets_all_of_its_gpus(tasks, expected):
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert cluster.local_devices(environment) == expected
    assert cluster.local_devices({}) is None


@pytest.fixture
def listening():
    """Yield a port on which another socket listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_port_in_use_is_reported_before_jax_binds_it(listening):
    with pytest.raises(UserError, match=rf"cannot listen on port {listening} here \(Address already"):
        cluster.check_port(Flags(f"127.0.0.1:{listening}", 2, 0))


def test_recently_closed_port_is_free():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # the side that closes first leaves the port in TIME_WAIT
    cluster.check_port(Flags(f"127.0.0.1:{port}", 2, 0))


def test_coordinator_may_start_later(listening):
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        threading.Timer(0.3, late.listen).start()
        cluster.await_coordinator(Flags(f"127.0.0.1:{late.getsockname()[1]}", 2, 1, start_timeout=30))
    cluster.await_coordinator(Flags(f"127.0.0.1:{listening}", 2, 1, start_timeout=0))


def test_missing_coordinator_is_an_error():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match=rf"nobody answers at 127\.0\.0\.1:{port} within 0\.1 s .*start process 0"):
            cluster.await_coordinator(Flags(f"127.0.0.1:{port}", 2, 1, start_timeout=0.1))
