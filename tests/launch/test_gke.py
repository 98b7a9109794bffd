"""launch/gke.sh with a fake kubectl: the manifest, the logs, each outcome, and refused arguments."""

import os
import shlex
import signal
from pathlib import Path

import pytest
import yaml

from tests.helpers.launching import NASTY, Launcher, wait_until

# Successive queries answer with successive items of `pods` and `conditions`, and then repeat the last one.
KUBECTL = r"""
ARGV = [word for word in ARGV if not word.startswith("--namespace=")]
def query(name):
    file = f"{HERE}/{name}"
    remaining = json.load(open(file)) if os.path.exists(file) else [""]
    json.dump(remaining[1:] or remaining, open(file, "w"))
    return remaining[0]
if ARGV[0] == "apply":
    import shutil
    shutil.copy(value("--filename"), f"{HERE}/applied")
    finish(int(os.environ.get("APPLY", "0")), "")
if ARGV[:2] == ["get", "pods"]:
    finish(text="".join(f"{pod}\n" for pod in query("pods").split(";") if pod))
if ARGV[:2] == ["get", "jobset"]:
    condition = query("conditions")
    finish(int(condition == "LOST"), condition)
if ARGV[0] == "logs":
    finish(text=f"log of {ARGV[2]}\n")
if ARGV[0] == "exec":
    os.chdir(f"{HERE}/volume")
    words = [word.replace("/mnt/xtransfer", ".") for word in ARGV[ARGV.index("--") + 1 :]]
    os.execvp(words[0], words)
"""
POOL = ("--name=run-1", "--accelerator=tpu-v5-lite-podslice", "--image=x/y:1")
MAIN = ("--", "--config", "c.py", "--workdir", "/mnt/xtransfer/r", NASTY)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    instance = Launcher(tmp_path)
    instance.fake("kubectl", KUBECTL)
    instance.fake("gcloud", "")
    return instance


def applied(launcher: Launcher) -> dict:
    return yaml.safe_load((launcher.fakes / "applied").read_text())


def expanded(word: str) -> str:
    """Expand $$ to $ as Kubernetes does. A single $ could start a variable's name, so there must be none."""
    assert "$" not in word.replace("$$", ""), word
    return word.replace("$$", "$")


def test_a_run_on_one_machine_with_a_bucket(launcher: Launcher) -> None:
    launcher.will(pods=["p-0 0 Pending", "p-0 0 Running"], conditions=["", "", "Completed "])
    flags = ("--topology=2x4", "--bucket=gs://mine", "--service-account=me", "--spot", "--fetch=he re", "--delete")
    code, stdout, stderr = launcher.run("gke.sh", "run", *POOL, *flags, "--namespace=mine", *MAIN)
    assert code == 0, stderr
    assert stdout == "log of p-0\n" == (launcher.cwd / "runs/run-1.logs/worker-0.log").read_text()
    spec = applied(launcher)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    program = ["/xtransfer/.venv/bin/python", "-m", "xtransfer.main", "--config.platform=tpu"]
    assert [expanded(word) for word in container["command"]] == [*program, *MAIN[1:]]
    assert container["resources"]["limits"] == {"google.com/tpu": 8} and container["image"] == "x/y:1"
    assert (job["parallelism"], job["completions"], spec["failurePolicy"]["maxRestarts"]) == (1, 1, 30)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2, 3, 4, 7]
    assert pod["serviceAccountName"] == "me" and job["template"]["metadata"]["annotations"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "2x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "mine"
    assert "persistentVolumeClaim" not in pod["volumes"][0] and len(pod["tolerations"]) == 2
    rsync = ["storage", "rsync", "--recursive", "--exclude=(^|.*/)checkpoints/.*", "gs://mine/r", "he re"]
    assert launcher.calls("gcloud") == [rsync]
    assert launcher.calls("kubectl")[-1] == ["--namespace=mine", "delete", "jobset", "run-1"]


def test_a_run_on_a_pod_slice_with_a_claim_and_a_restart(launcher: Launcher) -> None:
    first_pods = "a-0 0 Running;a-1 1 Running"
    launcher.will(
        pods=[first_pods, f"{first_pods};b-0 0 Running;b-1 1 Running"], conditions=["Restarting ", "", "Completed "]
    )
    code, _, stderr = launcher.run("gke.sh", "run", *POOL, "--topology=4x4", "--claim=no", "--restarts=5", *MAIN)
    assert code == 0, stderr
    spec = applied(launcher)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"], spec["failurePolicy"]) == (4, 4, {"maxRestarts": 5})
    assert "podFailurePolicy" not in job, "with several pods, exit status 1 may only mean that a peer was lost"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "no"}}]
    assert "serviceAccountName" not in pod and len(pod["tolerations"]) == 1
    logs = [(launcher.cwd / f"runs/run-1.logs/worker-{index}.log").read_text() for index in range(2)]
    # A separate process follows each pod's log, so the two logs of a worker may arrive in either order.
    assert [sorted(log.splitlines()) for log in logs] == [[f"log of {pod}-{i}" for pod in "ab"] for i in range(2)]


def test_a_failed_run_is_reported_and_kept(launcher: Launcher) -> None:
    launcher.will(pods=["a-0 0 Failed"], conditions=["", "Failed "])
    code, _, stderr = launcher.run("gke.sh", "run", *POOL, "--topology=2x4", "--claim=d", "--delete", *MAIN)
    assert code == 1 and stderr.splitlines()[-1].startswith(
        "error: the run failed (logs: runs/run-1.logs/worker-*.log)"
    )
    assert not launcher.calls("kubectl", "delete")
    launcher.will(conditions=["", "LOST"])
    code, _, stderr = launcher.run("gke.sh", "run", *POOL, "--topology=2x4", "--claim=d", *MAIN)
    assert code == 1 and "cannot find the JobSet run-1" in stderr
    code, _, stderr = launcher.run("gke.sh", "run", *POOL, "--topology=2x4", "--claim=d", *MAIN, APPLY="1")
    assert code == 1 and stderr.splitlines()[-1].startswith("error: the JobSet was not accepted")


def test_a_successful_query_resets_the_count_of_failed_ones(launcher: Launcher) -> None:
    launcher.will(pods=["a-0 0 Running"], conditions=[*["LOST"] * 6, "", *["LOST"] * 6, "Completed "])
    code, _, stderr = launcher.run("gke.sh", "run", *POOL, "--topology=2x4", "--claim=d", *MAIN)
    assert code == 0, stderr


def test_stopping_the_script_leaves_the_run_in_the_cluster(launcher: Launcher) -> None:
    launcher.will(pods=["a-0 0 Running"], conditions=[""])
    process = launcher.start("gke.sh", "run", *POOL, "--topology=2x4", "--claim=d", *MAIN)
    wait_until(lambda: len(launcher.calls("kubectl", "logs")) == 1)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 143 and "the run continues in the cluster" in stderr
    assert not launcher.calls("kubectl", "delete")


def test_results_are_fetched_from_a_claim_without_checkpoints(launcher: Launcher) -> None:
    run = launcher.fakes / "volume/r"
    (run / "teacher/checkpoints").mkdir(parents=True)
    (run / "teacher/checkpoints/weights").write_text("large")
    (run / "results.jsonl").write_text("rows")
    flags = ("--name=run-1", "--claim=disk", "--fetch", "he re")
    code, _, stderr = launcher.run("gke.sh", "fetch", *flags, *MAIN)
    assert code == 0, stderr
    fetched = {str(path.relative_to(launcher.cwd / "he re")) for path in (launcher.cwd / "he re").rglob("*")}
    assert fetched == {"results.jsonl", "teacher"}
    reader = yaml.safe_load(launcher.calls("kubectl", "run")[0][-1].partition("=")[2])["spec"]
    assert reader["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    assert launcher.calls("kubectl")[-1] == ["delete", "pod", "run-1-fetch", "--wait=false"]


def test_a_dry_run_prints_the_manifest(launcher: Launcher) -> None:
    flags = (*POOL, "--topology=2x4", "--claim=d")
    code, stdout, _ = launcher.run("gke.sh", "run", *flags, "--dry-run", "--fetch=f", "--delete", *MAIN)
    assert code == 0 and launcher.calls("kubectl") == [] and list(launcher.cwd.iterdir()) == []
    head, _, rest = stdout.partition("\n")
    assert shlex.split(head) == ["kubectl", "apply", "--filename=-", "<<END"]
    text, _, commands = rest.partition("END\n")
    assert [line.split()[0] for line in commands.splitlines()] == ["mkdir", *["kubectl"] * 5]
    launcher.will(conditions=["Completed"])
    assert launcher.run("gke.sh", "run", *flags, *MAIN)[0] == 0
    assert yaml.safe_load(text) == applied(launcher)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up",), "'up' is not one of run, fetch, delete (see --help)"),
        (("run", *POOL, "--topology=2x4", *MAIN), "where is the workdir? Give --claim or --bucket"),
        (("run", *POOL, "--claim=c", "--topology=8", *MAIN), "--topology '8' is not a topology such as 2x4"),
        (("run", *POOL, "--claim=c", "--topology=2x3", "--chips-per-pod=4", *MAIN), "--topology 2x3 has 6 chips"),
        (("run", *POOL, "--claim=c", "--", "--workdir=w"), "--workdir 'w' is not below /mnt/xtransfer"),
        (("run", *POOL, "--claim=a: b", *MAIN), "--claim: 'a: b' is not a name that Kubernetes allows: lower-case"),
        (("run", *POOL, "--claim=c", "--topology=0x4", *MAIN), "--topology '0x4' is not a topology such as 2x4"),
        (("run", *POOL, "--claim=c", "--topology=2x4", "--restarts=030", *MAIN), "--restarts: '030' is not a number"),
        (("run", *POOL, "--claim=c", "--topology=2x4", "--chips-per-pod=08", *MAIN), "--chips-per-pod: '08' is not"),
        (
            ("run", *POOL, "--claim=Disk", "--topology=2x4", *MAIN),
            "--claim: 'Disk' is not a name that Kubernetes allows",
        ),
        (("run", *POOL, "--claim=c", "--namespace=my.own", "--topology=2x4", *MAIN), "--namespace: 'my.own' is not a"),
        (("run", *POOL, "--bucket=gs://mine/folder", "--topology=2x4", *MAIN), "--bucket: 'mine/folder' is not a name"),
        (("delete", "--name=Run_1"), "--name: 'Run_1' is not a name that Kubernetes allows: lower-case letters"),
        (("delete", "--name=1-run"), "--name '1-run' must begin with a letter and have at most 45 characters"),
        (("delete", f"--name={'a' * 46}"), f"--name '{'a' * 46}' must begin with a letter and have at most 45"),
        (
            ("run", *POOL, "--claim=c", "--topology=2x4", "--", "--config=c", "--workdir=/mnt/xtransfer/../x"),
            "--workdir '/mnt/xtransfer/../x' is not below /mnt/xtransfer",
        ),
        (("run", *POOL, "--claim=c", "--topology=2x4", "--", f"--workdir={MAIN[4]}"), "--config is missing among"),
        (("run", "--name=n", "--claim=c", *MAIN), "--accelerator is missing (see --help)"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    launcher: Launcher, arguments: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = launcher.run("gke.sh", *arguments)
    assert code == 1 and stdout == "" and stderr.startswith(f"error: {message}") and stderr.count("\n") == 1
    assert launcher.calls("kubectl") == []
