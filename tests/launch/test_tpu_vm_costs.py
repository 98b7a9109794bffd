"""launch/tpu_vm.sh and its costs: what is refused before a TPU is created, and the warning when one stays up."""

from pathlib import Path

import pytest

from tests.helpers.launching import Launcher
from tests.launch.test_tpu_vm import GCLOUD, MAIN, ONE, POD, SHARED, verbs

DELETE = "launch/tpu_vm.sh delete --name tpu --zone us-west4-a"
STILL_UP = f"xtransfer: tpu is still up, which costs: fix the cause and start again, or {DELETE}"


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    instance = Launcher(tmp_path)
    instance.fake("gcloud", GCLOUD)
    return instance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", *ONE, "--name=../tpu"), "--name '../tpu' is not a name for a TPU"),
        (("up", *ONE, "--name=-tpu"), "--name '-tpu' is not a name for a TPU"),
        (("delete", "--zone=z", "--name", "a b"), "--name 'a b' is not a name for a TPU"),
        (("up", "--zone=z", "--type=v5litepod-8", "--name", "--spot"), "--name: a value is missing before '--spot'"),
        (("up", *ONE, "--project=--spot"), "--project: a value is missing before '--spot'"),
        (("run", *ONE, "--create-flag", *MAIN), "--create-flag: a value is missing before '--'"),
        (("up", *ONE, "--type=v5litepod-0"), "--type 'v5litepod-0' is not a TPU type such as v5litepod-8"),
        (("up", *ONE, "--type=v5litepod-008"), "--type 'v5litepod-008' is not a TPU type"),
        (("up", *ONE, "--retries=08"), "--retries: '08' is not a number from 0"),
        (("run", *POD, "--storage=mine", *SHARED), "--storage 'mine' is neither gs://BUCKET[/FOLDER] nor HOST:/SHARE"),
        (("run", *POD, "--storage=gs://", *SHARED), "--storage 'gs://' is neither"),
        (("run", *POD, "--storage=s3://mine", *SHARED), "--storage 's3://mine' is neither"),
        (("run", *POD, "--storage=host:share", *SHARED), "--storage 'host:share' is neither"),
        (("run", *POD, "--", "--config=c", "--workdir=/mnt/xtransfer/../x"), "--workdir /mnt/xtransfer/../x is not"),
        (("run", *ONE, "--", "--workdir=w"), "--config is missing among the flags of xtransfer.main, after --"),
        (("run", *ONE, "--", "--workdir=w", "--config", "--config.x=1"), "--config is missing among the flags"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_created(
    launcher: Launcher, arguments: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = launcher.run("tpu_vm.sh", *arguments)
    assert code == 1 and stdout == "" and launcher.calls("gcloud") == []
    assert stderr.startswith(f"error: {message}") and stderr.count("\n") == 1


@pytest.mark.parametrize("storage", ["gs://my_b.x/a b", "10.0.0.2:/share", "[fe80::1]:/a/b"])
def test_valid_storage_is_accepted(launcher: Launcher, storage: str) -> None:
    code, _, stderr = launcher.run("tpu_vm.sh", "run", "--dry-run", *POD, f"--storage={storage}", *SHARED)
    assert code == 0, stderr


@pytest.mark.parametrize(
    "answer",
    [
        "NOT_FOUND: Project 'projects/gone' was not found",
        "The network 'x' was not found",
        "NOT_FOUND: Resource 'projects/p/locations/z/nodes/tpu-2' was not found.",
    ],
)
def test_no_tpu_is_created_if_something_else_is_not_found(launcher: Launcher, answer: str) -> None:
    launcher.fake("gcloud", f"finish(1, {'ERROR: (gcloud.compute.tpus.tpu-vm.describe) ' + answer!r})")
    code, _, stderr = launcher.run("tpu_vm.sh", "up", *ONE)
    assert code == 1 and verbs(launcher) == []
    assert stderr.splitlines()[-1].startswith("error: gcloud cannot describe tpu: ERROR: ")


def test_a_failed_script_warns_that_the_tpu_is_still_up(launcher: Launcher) -> None:
    launcher.fake("tar", "sys.exit(2)")
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, *MAIN)
    assert code == 1 and stderr.splitlines()[-2].endswith("could not be packed") and verbs(launcher) == ["create"]
    assert stderr.splitlines()[-1] == STILL_UP
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, "--queued", "--project=mine", *MAIN)
    assert code == 1 and stderr.splitlines()[-1] == f"{STILL_UP} --project mine --queued"


def test_an_interrupted_creation_warns_that_the_tpu_may_be_up(launcher: Launcher) -> None:
    launcher.will(creates=["ERROR: gcloud crashed (TransportError): no network"])
    code, _, stderr = launcher.run("tpu_vm.sh", "up", *ONE)
    assert code == 1 and stderr.splitlines()[-1].startswith("xtransfer: tpu is perhaps up, which would cost: ")


def test_a_failed_deletion_is_reported_together_with_the_results(launcher: Launcher) -> None:
    launcher.fake("gcloud", GCLOUD.replace("os.remove(NODE)", "finish(1, 'ERROR: DEADLINE_EXCEEDED')"))
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, "--fetch=got", "--delete", *MAIN)
    assert code == 1 and (launcher.cwd / "got/results.jsonl").exists()
    assert stderr.splitlines()[-1].endswith(
        "error: the run is done and its results are in got, but tpu could not be deleted: "
        f"it is still up, which costs: {DELETE}"
    )
    assert stderr.count("still up") == 1
