"""launch/slurm.sh with a fake SLURM: the submitted job, and how its script handles each exit status."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.helpers.launching import NASTY, Launcher

# Runs the script as SLURM would, with a job id.
SBATCH = """
os.environ.update(SLURM_JOB_ID="17", SLURM_RESTART_COUNT=os.environ.get("RESTARTS", "0"))
fcntl.flock(lock, fcntl.LOCK_UN)
os.execvp("bash", ["bash", ARGV[-1]])
"""
SRUN = """
fcntl.flock(lock, fcntl.LOCK_UN)
words = [word for word in ARGV if not word.startswith(("--open-mode", "--output"))]
os.execvp(words[0], words)
"""
MAIN = ("--", "--config", "c.py", "--workdir", "out put%", NASTY)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    instance = Launcher(tmp_path)
    instance.fake("sbatch", SBATCH)
    instance.fake("srun", SRUN)
    instance.fake("scontrol", "")
    return instance


def test_the_job_runs_main_with_the_same_flags(launcher: Launcher) -> None:
    flags = ("--nodes=2", "--gpus-per-node", "4", "--time=1:00:00", "--sbatch-flag=--account=a b", "--wait")
    code, _, stderr = launcher.run("slurm.sh", *flags, *MAIN)
    assert code == 0, stderr
    logs = f"{launcher.cwd}/out put%.logs"
    assert launcher.calls("sbatch") == [
        ["--job-name=xtransfer", "--nodes=2", "--ntasks-per-node=4", "--requeue", "--open-mode=append"]
        + ["--signal=TERM@300", f"--output={logs.replace('%', '%%')}/job.log", f"--chdir={launcher.cwd}"]
        + ["--gpus-per-node=4", "--time=1:00:00", "--wait", "--account=a b", f"{logs}/job.sh"]
    ]
    assert launcher.mains()[0][2:] == ["--config.platform=gpu", *MAIN[1:]]
    assert launcher.calls("srun")[0][1] == f"--output={logs.replace('%', '%%')}/task-%t.log"
    assert launcher.calls("scontrol") == []


@pytest.mark.parametrize(
    ("status", "restarts", "code", "requeued"), [(143, "0", 0, True), (143, "2", 143, False), (1, "0", 1, False)]
)
def test_a_preempted_run_is_requeued(launcher: Launcher, status: int, restarts: str, code: int, requeued: bool) -> None:
    launcher.will(statuses=[status])
    assert launcher.run("slurm.sh", "--requeues=2", *MAIN, RESTARTS=restarts)[0] == code
    assert launcher.calls("scontrol") == ([["requeue", "17"]] if requeued else [])


def test_a_dry_run_prints_commands_that_submit_the_same_job(launcher: Launcher) -> None:
    assert launcher.run("slurm.sh", *MAIN)[0] == 0
    code, stdout, _ = launcher.run("slurm.sh", "--dry-run", *MAIN)
    assert code == 0 and len(launcher.calls("sbatch")) == 1
    env = {**os.environ, "PATH": f"{launcher.fakes / 'bin'}:{os.environ['PATH']}", "FAKES": str(launcher.fakes)}
    subprocess.run(["bash", "-c", stdout], check=True, env=env, cwd=launcher.cwd)
    assert launcher.calls("sbatch")[0] == launcher.calls("sbatch")[1]
    assert launcher.mains()[0] == launcher.mains()[1] and launcher.mains()[0][-1] == NASTY
    assert shlex.split(stdout)[:2] == ["mkdir", "-p"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--node=2", *MAIN), "unknown flag '--node=2'"),
        (("--nodes=two", *MAIN), "--nodes: 'two' is not a number from 1 (at most nine digits, no leading zero)"),
        (("--dry-run", "--gpus-per-node", "08", *MAIN), "--gpus-per-node: '08' is not a number from 0 (at most nine"),
        (("--nodes=0", *MAIN), "--nodes: '0' is not a number from 1"),
        (("--notice=99999999999999999999", *MAIN), "--notice: '99999999999999999999' is not a number from 0"),
        (("--cpus-per-task=0", *MAIN), "--cpus-per-task: '0' is not a number from 1"),
        (("--partition", "--wait", *MAIN), "--partition: a value is missing before '--wait'"),
        (("--nodes=2", "--", "--workdir=w"), "--config is missing among the flags of xtransfer.main, after --"),
        (("--nodes=2", "--", "--config=c"), "--workdir is missing among the flags of xtransfer.main"),
        (("2", *MAIN), "unexpected argument '2'"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    launcher: Launcher, arguments: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = launcher.run("slurm.sh", *arguments)
    assert code == 1 and stdout == "" and stderr.startswith(f"error: {message}") and stderr.count("\n") == 1
    assert launcher.calls("sbatch") == []
