"""launch/tpu_vm.sh with a fake gcloud that keeps machines as folders: its requests, runs, recoveries, and warnings."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.helpers.launching import NASTY, Launcher, wait_until

# The states of the node come from `states`, and the states of the queued resource from `requests`. Without any, an
# existing resource is ready. A worker's home is a folder. There `ssh` runs its command as sshd does: through a shell,
# which removes one more level of quoting.
GCLOUD = r"""
import glob, shutil
NODE = f"{HERE}/node"
NAMED = {"tpu-vm": "nodes", "queued-resources": "queuedResources"}
def remove_homes():
    for home in glob.glob(f"{HERE}/worker-*"):
        shutil.rmtree(home)
def describe(kind, exists, state):
    if state == "GONE-FROM-LIST" or not exists:
        absent = f"NOT_FOUND: Resource 'projects/p/locations/z/{NAMED[kind]}/tpu' was not found. This command is…"
        finish(1, f"ERROR: (gcloud.compute.tpus.{kind}.describe) {absent}\n")
    if state == "OFFLINE":
        finish(1, "ERROR: gcloud crashed (TransportError): no network\n")
    finish(text=state + "\n")
if ARGV[:2] == ["storage", "rsync"]:
    finish()
kind, verb = ARGV[2:4]
if verb == "create":
    answer = take("creates", "")
    if answer:
        finish(1, answer + "\n")
    open(NODE, "w").close()
elif verb == "delete":
    os.remove(NODE)
    remove_homes()
elif verb == "describe":
    if "networkEndpoints" in value("--format"):
        finish(text=f"{os.environ.get('WORKERS', '1')}\n")
    queue = "requests" if kind == "queued-resources" else "states"
    ready = "ACTIVE" if kind == "queued-resources" else "READY"
    describe(kind, os.path.exists(NODE), take(queue, ready))
elif verb in ("ssh", "scp"):
    if not os.path.exists(NODE):
        finish(1, "ERROR: no such node\n")
    worker, command = value("--worker"), value("--command")
    event = take("ssh", "") if command is None or " run " in command else ""
    home = f"{HERE}/worker-{worker}"
    os.makedirs(home, exist_ok=True)
    if event == "preempted":
        remove_homes()
    if event:
        finish(255, "ssh: connection closed\n")
    if verb == "scp":
        source, target = (word.replace("tpu:", f"{home}/") for word in ARGV[4:6])
        shutil.copy(source, target)
        finish()
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.chdir(home)
    remote = " ".join(command.split(" "))
    os.environ["HOME"] = home
    os.execvp("bash", ["bash", "-c", remote])
"""
ONE = ("--name", "tpu", "--zone", "us-west4-a", "--type", "v5litepod-8")
POD = ("--name=tpu", "--zone=us-west4-a", "--type=v5litepod-16", "--storage=gs://mine/folder")
MAIN = ("--", "--config", "configs/x.py", "--workdir", "out")
SHARED = ("--", "--config=configs/x.py", "--workdir=/mnt/xtransfer/out")
DELETE = "launch/tpu_vm.sh delete --name tpu --zone us-west4-a"
STILL_UP = f"xtransfer: tpu is still up, which costs: fix the cause and start again, or {DELETE}"


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    instance = Launcher(tmp_path)
    instance.fake("gcloud", GCLOUD)
    for tool in ("sudo", "gcsfuse", "mount.nfs"):
        instance.fake(tool, "")
    instance.fake("mountpoint", "sys.exit(1)")
    return instance


def verbs(launcher: Launcher) -> list[str]:
    """Return the verbs of gcloud's calls in order, except describe, ssh, and scp."""
    called = [call[3] if call[0] == "compute" else call[1] for call in launcher.calls("gcloud")]
    return [verb for verb in called if verb not in ("describe", "ssh", "scp")]


def test_run_creates_a_machine_runs_fetches_and_deletes(launcher: Launcher) -> None:
    code, stdout, stderr = launcher.run("tpu_vm.sh", "run", *ONE, "--fetch", "res ults", "--delete", *MAIN, NASTY)
    assert code == 0, stderr
    home = launcher.fakes / "worker-0"
    assert verbs(launcher) == ["create", "delete"]
    assert launcher.calls("gcloud", "create") == [
        ["compute", "tpus", "tpu-vm", "create", "tpu", "--version=v2-alpha-tpuv5-lite"]
        + ["--accelerator-type=v5litepod-8", "--zone=us-west4-a"]
    ]
    main = ["--config.platform=tpu", *MAIN[1:], NASTY]
    assert launcher.mains() == [[str(home), str(home / "xtransfer"), *main]]
    assert "main ends with 0" in stdout
    assert "main ends with 0" in (launcher.cwd / "runs/tpu.logs/worker-0.log").read_text()
    fetched = {str(p.relative_to(launcher.cwd / "res ults")) for p in (launcher.cwd / "res ults").rglob("*")}
    assert fetched == {"results.jsonl", "teacher"}


def test_an_existing_machine_is_reused_with_the_new_code(launcher: Launcher) -> None:
    old = launcher.root / "old.py"
    old.write_text("")
    assert launcher.run("tpu_vm.sh", "up", *ONE)[0] == 0
    assert launcher.run("tpu_vm.sh", "run", *ONE, *MAIN)[0] == 0
    checkout = launcher.fakes / "worker-0/xtransfer"
    assert (checkout / "old.py").exists()
    old.unlink()
    (launcher.root / "ne w.py").write_text("")
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, *MAIN)
    assert code == 0 and verbs(launcher) == ["create"], stderr
    assert (checkout / "ne w.py").exists() and not (checkout / "old.py").exists()
    assert (checkout / "out/results.jsonl").exists(), "the run's files are kept"
    assert len(launcher.calls("pip")) == 2, "the machine is set up only once"


def test_a_repository_can_be_cloned_instead(launcher: Launcher) -> None:
    launcher.fake("git", "import shutil\nif ARGV[0] == 'clone': shutil.copytree(os.environ['CHECKOUT'], 'xtransfer')")
    flags = ("--repository", "https://x.org/a b.git", "--revision", "v1;id")
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, *flags, *MAIN, CHECKOUT=str(launcher.root))
    assert code == 0, stderr
    assert launcher.calls("git")[0] == ["clone", "-q", "https://x.org/a b.git", "xtransfer"]
    assert ["checkout", "-q", "--detach", "v1;id"] in launcher.calls("git") and not launcher.calls("gcloud", "scp")
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, *flags[:2], *MAIN)
    assert code == 1 and stderr.startswith("error: --repository needs --revision too")


def test_up_waits_until_the_machine_is_ready(launcher: Launcher) -> None:
    launcher.will(states=["GONE-FROM-LIST", "CREATING", "CREATING", "STARTING", "READY"])
    assert launcher.run("tpu_vm.sh", "up", *ONE)[0] == 0
    assert len(launcher.calls("gcloud", "describe")) == 5 and verbs(launcher) == ["create"]


def test_a_queued_resource_is_awaited_and_requested_again_if_it_fails(launcher: Launcher) -> None:
    flags = (
        *ONE,
        "--queued",
        "--project=mine",
        "--create-flag=--valid-until-duration=6h",
        "--create-flag",
        "--labels=a=b",
    )
    launcher.will(requests=["", "WAITING_FOR_RESOURCES", "PROVISIONING", "FAILED", "", "ACTIVE"])
    code, _, stderr = launcher.run("tpu_vm.sh", "up", *flags)
    assert code == 0, stderr
    create = ["compute", "tpus", "queued-resources", "create", "tpu", "--node-id=tpu"]
    create += ["--runtime-version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-8", "--valid-until-duration=6h"]
    assert launcher.calls("gcloud", "create") == [[*create, "--labels=a=b", "--zone=us-west4-a", "--project=mine"]] * 2
    assert launcher.run("tpu_vm.sh", "delete", *flags)[0] == 0
    delete = ["compute", "tpus", "queued-resources", "delete", "tpu", "--force", "--quiet"]
    assert launcher.calls("gcloud", "delete") == [[*delete, "--zone=us-west4-a", "--project=mine"]] * 2


def test_a_preempted_run_restarts_on_a_new_machine(launcher: Launcher) -> None:
    flags = (*ONE, "--spot", "--storage=10.0.0.2:/share")
    states = ["", "READY", "PREEMPTED", "", "READY", "TERMINATED"]
    launcher.will(ssh=["", "preempted", "", "", "", ""], statuses=[143, 0], states=states)
    code, stdout, stderr = launcher.run("tpu_vm.sh", "run", *flags, *SHARED)
    assert code == 0, stderr
    assert verbs(launcher) == ["create", "delete", "create", "delete", "create"]
    assert all("--spot" in call for call in launcher.calls("gcloud", "create"))
    assert [main[2:] for main in launcher.mains()] == [["--config.platform=tpu", *SHARED[1:]]] * 2
    assert stderr.count("tpu was lost") == 2 and "(the workers' statuses: 255); restarting, 1 of 30" in stderr
    assert ["mount", "-t", "nfs", "10.0.0.2:/share", "/mnt/xtransfer"] in launcher.calls("sudo")


def test_the_number_of_restarts_is_limited(launcher: Launcher) -> None:
    launcher.will(statuses=[143] * 9)
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, "--retries", "2", *MAIN)
    assert code == 1 and len(launcher.mains()) == 3
    assert stderr.splitlines()[-2] == "error: gave up after 2 restarts; the same command resumes"
    assert stderr.splitlines()[-1].startswith("xtransfer: tpu is still up, which costs: ")


@pytest.mark.parametrize("status", [1, 2, 134, 137])
def test_a_failed_run_is_not_restarted(launcher: Launcher, status: int) -> None:
    launcher.will(statuses=[status, 0])
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *ONE, "--delete", "--fetch=got", *MAIN)
    assert code == status and len(launcher.mains()) == 1 and verbs(launcher) == ["create"]
    assert f"main ends with {status}" in stderr, "the end of the run's log"
    assert f"worker 0 failed with status {status}" in stderr and "tpu is still up, which costs" in stderr


@pytest.mark.parametrize(
    ("events", "statuses", "starts"),
    [(["", "", "", "", "lost"], [0, 0, 0], 3), ([], [134, 134, 0, 0], 4), ([], [0, 143, 0, 0], 4)],
    ids=["ssh of one worker", "aborted after a peer", "one preempted"],
)
def test_a_pod_restarts_on_all_workers(launcher: Launcher, events: list[str], statuses: list[int], starts: int) -> None:
    launcher.will(ssh=[*events[:2], *events[4:]], statuses=statuses)
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *POD, *SHARED, WORKERS="2")
    assert code == 0, stderr
    assert len(launcher.mains()) == starts and verbs(launcher) == ["create"], stderr
    logs = [(launcher.cwd / f"runs/tpu.logs/worker-{i}.log").read_text() for i in range(2)]
    assert all("main ends with 0" in log for log in logs)
    assert len(launcher.calls("gcsfuse", "--only-dir", "folder", "mine", "/mnt/xtransfer")) == 4


@pytest.mark.parametrize(("statuses", "starts"), [([1, 1], 2), ([137, 1, 124, 124] * 2, 8)])
def test_a_pod_stops_after_an_error_or_a_repeated_crash(launcher: Launcher, statuses: list[int], starts: int) -> None:
    launcher.will(statuses=statuses)
    code, _, stderr = launcher.run("tpu_vm.sh", "run", *POD, *SHARED, WORKERS="2")
    assert code in statuses
    assert len(launcher.mains()) == starts and f"main ends with {code}\n" in stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "ERROR: quota metric 'TPUV5s' exceeded: Limit 0",
            "the project's quota does not allow v5litepod-8 in us-west4-a",
        ),
        ("ERROR: PERMISSION_DENIED: no", "tpu could not be created; gcloud's message is above"),
    ],
)
def test_a_permanent_error_is_reported_without_a_retry(launcher: Launcher, answer: str, message: str) -> None:
    launcher.will(creates=[answer])
    code, _, stderr = launcher.run("tpu_vm.sh", "up", *ONE)
    assert code == 1 and verbs(launcher) == ["create"] and answer in stderr
    assert stderr.splitlines()[-1].startswith(f"error: {message}")


def test_a_lack_of_capacity_is_retried_a_limited_number_of_times(launcher: Launcher) -> None:
    no_capacity = 'ERROR: "code": 8, There is no more capacity in the zone "us-west4-a"'
    launcher.will(creates=[no_capacity, no_capacity, "ERROR: ALREADY_EXISTS: tpu"], states=["", "READY"])
    (launcher.fakes / "node").write_text("another terminal created it")
    launcher.will(states=["GONE-FROM-LIST", "READY"])
    assert launcher.run("tpu_vm.sh", "up", *ONE)[0] == 0 and verbs(launcher) == ["create"] * 3
    launcher.will(creates=[no_capacity] * 9, states=["GONE-FROM-LIST"])
    code, _, stderr = launcher.run("tpu_vm.sh", "up", *ONE, "--retries=1")
    assert code == 1 and verbs(launcher) == ["create"] * 5
    assert "no capacity for v5litepod-8 in us-west4-a after 2 attempts" in stderr.splitlines()[-1]


def test_a_network_failure_is_an_error_at_first_and_retried_later(launcher: Launcher) -> None:
    launcher.will(states=["OFFLINE"])
    (launcher.fakes / "node").write_text("")
    code, _, stderr = launcher.run("tpu_vm.sh", "up", *ONE)
    assert code == 1 and stderr.splitlines()[-1].startswith("error: gcloud cannot describe tpu: ERROR: gcloud crashed")
    launcher.will(states=["CREATING", "OFFLINE", "OFFLINE", "READY"])
    assert launcher.run("tpu_vm.sh", "up", *ONE)[0] == 0


def test_stopping_the_script_leaves_the_run_and_the_same_command_follows_it(launcher: Launcher) -> None:
    (launcher.fakes / "hang").write_text("")
    process = launcher.start("tpu_vm.sh", "run", *ONE, *MAIN)
    wait_until(lambda: "main begins" in read(launcher.cwd / "runs/tpu.logs/worker-0.log"))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 143 and "the run continues on tpu" in stderr
    (launcher.root / "later.py").write_text("")
    follower = launcher.start("tpu_vm.sh", "run", *ONE, *MAIN)
    wait_until(lambda: "following the run" in read(launcher.cwd / "runs/tpu.logs/worker-0.log"))
    (launcher.fakes / "hang").unlink()
    stdout, stderr = follower.communicate(timeout=20)
    assert follower.returncode == 0, stderr
    assert "main begins" in stdout and "main ends with 0" in stdout
    assert len(launcher.mains()) == 1 and not (launcher.fakes / "worker-0/xtransfer/later.py").exists()


def test_a_second_run_is_refused_and_the_first_can_be_followed(launcher: Launcher) -> None:
    home = launcher.fakes / "home"
    home.mkdir()
    go, word = launcher.fakes / "go", "it's $HOME"
    command = ("bash", "-c", f'echo "$0"; until [ -e "{go}" ]; do sleep 0.02; done; exit 7', word)
    first = launcher.start("worker.sh", "run", "a", *command, HOME=str(home))
    wait_until(lambda: word in read(home / ".xtransfer-runs/a/log"))
    assert launcher.run("worker.sh", "running", HOME=str(home))[0] == 0
    os.killpg(first.pid, signal.SIGKILL)  # the connection is lost, and with it the processes it carries
    code, _, stderr = launcher.run("worker.sh", "run", "b", "another", HOME=str(home))
    assert code == 1 and "another run is in progress" in stderr and stderr.count("\n") == 1
    go.write_text("")
    code, stdout, stderr = launcher.run("worker.sh", "run", "c", *command, HOME=str(home))
    assert code == 7 and stdout == f"{word}\n" and "run c ended with status 7" in stderr
    assert launcher.run("worker.sh", "running", HOME=str(home))[0] == 1
    last = launcher.start("worker.sh", "run", "d", "bash", "-c", "echo on; sleep 20", HOME=str(home))
    wait_until(lambda: "on" in read(home / ".xtransfer-runs/d/log"))
    wait_until(lambda: read(home / ".xtransfer-runs/d/pid"))
    os.killpg(int(read(home / ".xtransfer-runs/d/pid")), signal.SIGTERM)  # as at a shutdown
    assert last.wait(timeout=10) == 143


def test_results_are_fetched_from_the_bucket_without_a_machine(launcher: Launcher) -> None:
    flags = ("--name=tpu", "--zone=z", "--storage=gs://mine/folder/", "--fetch", "he re", *SHARED)
    rsync = ["storage", "rsync", "--recursive", "--exclude=(^|.*/)checkpoints/.*", "gs://mine/folder/out", "he re"]
    assert launcher.run("tpu_vm.sh", "fetch", *flags)[0] == 0
    assert launcher.run("tpu_vm.sh", "fetch", "--checkpoints", *flags)[0] == 0
    assert launcher.calls("gcloud") == [rsync, [word for word in rsync if "exclude" not in word]]


def test_a_dry_run_prints_the_calls_of_a_run_and_makes_none(launcher: Launcher) -> None:
    flags = ("--storage=gs://mine/folder", "--fetch", "res ults", "--delete", *SHARED, NASTY)
    code, stdout, stderr = launcher.run("tpu_vm.sh", "run", *ONE, "--dry-run", *flags)
    assert code == 0, stderr
    assert not (launcher.fakes / "calls").exists() and list(launcher.cwd.iterdir()) == []
    assert launcher.run("tpu_vm.sh", "run", *ONE, *flags)[0] == 0
    text = "\n".join(line for line in stdout.splitlines() if not line.startswith("#"))
    printed, words = [], shlex.split(text, posix=True)
    for word in words:
        if word in ("gcloud", "git", "mkdir"):
            printed.append([])
        printed[-1].append(word)
    called = [call for call in launcher.calls("gcloud") if "describe" not in call]
    called = [call for call in called if not any(w in ("--command=true",) or w.endswith("running") for w in call)]
    stamp = re.compile(r" run \S+ ")
    assert [[stamp.sub(" run ID ", word) for word in line[1:]] for line in printed if line[0] == "gcloud"] == [
        [stamp.sub(" run ID ", word) for word in call] for call in called
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("go",), "'go' is not one of up, run, fetch, delete (see --help)"),
        (("run", "--spott", *ONE), "unknown flag '--spott' (see --help); the flags of xtransfer.main come after --"),
        (("run", *ONE, "out"), "unexpected argument 'out' (see --help); the flags of xtransfer.main come after --"),
        (("up", "--name=n", "--zone"), "--zone: a value is missing"),
        (("up", "--name=n", "--type=v5litepod-8"), "--zone is missing (see --help)"),
        (("up", "--name=n", "--zone=z", "--type=v5e"), "--type 'v5e' is not a TPU type such as v5litepod-8"),
        (("up", *ONE, "--retries=x"), "--retries: 'x' is not a number from 0 (at most nine digits, no leading zero)"),
        (("run", *ONE, "--", "--config=c"), "--workdir is missing among the flags of xtransfer.main, after --"),
        (("run", *ONE, "--spot", *MAIN), "a spot VM loses its disk when it is taken away: give --storage"),
        (("run", *POD[:3], *MAIN), "v5litepod-16 has 4 workers, and they must share --workdir: give --storage"),
        (("run", *POD, *MAIN), "--workdir out is not below /mnt/xtransfer, where --storage is mounted"),
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
def test_invalid_arguments_are_refused_in_one_line_before_anything_is_created(
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


def test_help_lists_the_flags(launcher: Launcher) -> None:
    for arguments in (("--help",), ("run", "--help")):
        code, stdout, _ = launcher.run("tpu_vm.sh", *arguments)
        assert code == 0 and "--storage S" in stdout and "set -euo" not in stdout


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
