#!/usr/bin/env bash
# Runs an experiment as a SLURM job, from this checkout on storage that all nodes share. Requeued until it is done.
#
#   launch/slurm.sh --nodes 2 --gpus-per-node 8 --time 24:00:00 [flags] -- FLAGS
#   XTRANSFER_EXTRAS=cuda launch/slurm.sh …       installs JAX's packages for CUDA too
#
# FLAGS go to `python -m xtransfer.main` in every task unchanged; with GPUs, --config.platform=gpu is added.
# One task runs per GPU, as JAX expects, or one per node without GPUs. Before the time limit, and when the job is
# preempted, the run saves and ends with status 143, and the job returns to the queue. A failed job does not.
#
#   --nodes N            (default: 1)
#   --gpus-per-node G    (default: 0)
#   --cpus-per-task C    (default: SLURM's)
#   --time T             time limit until a requeue, such as 24:00:00 (default: SLURM's)
#   --partition P        (default: SLURM's)
#   --sbatch-flag F      one more flag for sbatch, such as --sbatch-flag=--account=mine; may be repeated
#   --name N             the job's name (default: xtransfer)
#   --requeues K         how often the job may return to the queue (default: 100)
#   --notice S           seconds before the time limit at which SLURM signals the run to save (default: 300)
#   --logs DIR           the script, the job's log, and one log per task (default: WORKDIR.logs)
#   --wait               return when the job is done, with its exit status
#   --dry-run            print the script and the command, and submit nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus_per_node=0 cpus_per_task="" time="" partition="" name=xtransfer requeues=100 notice=300 logs="" wait=false

job() { # prints the script for sbatch
  local platform=""
  [[ $gpus_per_node -gt 0 ]] || platform="export JAX_PLATFORMS=\"\${JAX_PLATFORMS:-cpu}\""
  cat <<END
#!/usr/bin/env bash
# Written by launch/slurm.sh.
set -uo pipefail
$platform
trap : TERM # it is for the tasks; this shell waits for them
srun --open-mode=append --output=$(shell_words "$(patterned "$logs")/task-%t.log") \\
  $(shell_words "$python" -m xtransfer.main "${main_flags[@]}")
status=\$?
if [[ \$status -eq 143 && "\${SLURM_RESTART_COUNT:-0}" -lt $requeues ]]; then
  echo "the run has saved and stopped: returning to the queue"
  scontrol requeue "\$SLURM_JOB_ID" && exit 0
fi
exit "\$status"
END
}

patterned() { # prints a path with % escaped
  printf '%s\n' "${1//%/%%}"
}

main() {
  local tasks=1 flag
  local -a flags
  parse_flags "nodes gpus-per-node cpus-per-task time partition sbatch-flag name requeues notice logs" "wait dry-run" "$@"
  check_number nodes "$nodes" 1
  for flag in gpus_per_node requeues notice; do check_number "${flag//_/-}" "${!flag}" 0; done
  [[ -z "$cpus_per_task" ]] || check_number cpus-per-task "$cpus_per_task" 1
  require_main_flags workdir config
  workdir="$(flag_of_main workdir)" workdir="${workdir%/}"
  logs="${logs:-$workdir.logs}"
  [[ "$logs" == /* ]] || logs="$PWD/$logs"
  if [[ $gpus_per_node -gt 0 ]]; then
    tasks=$gpus_per_node
    default_platform gpu
  fi
  # TERM goes to the tasks of the job; open-mode keeps the log from before a requeue.
  flags=("--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$tasks" --requeue --open-mode=append "--signal=TERM@$notice")
  flags+=("--output=$(patterned "$logs")/job.log" "--chdir=$PWD")
  [[ $gpus_per_node -eq 0 ]] || flags+=("--gpus-per-node=$gpus_per_node")
  [[ -z "$cpus_per_task" ]] || flags+=("--cpus-per-task=$cpus_per_task")
  [[ -z "$time" ]] || flags+=("--time=$time")
  [[ -z "$partition" ]] || flags+=("--partition=$partition")
  ! $wait || flags+=(--wait)
  flags+=(${passed[@]+"${passed[@]}"})
  if $dry_run; then
    shell_words mkdir -p "$logs"
    printf "cat >%s <<'END'\n" "$(shell_words "$logs/job.sh")"
    job
    echo END
  else
    command -v sbatch >/dev/null || die "sbatch is missing: start this on a login node of the cluster"
    set_up base
    mkdir -p "$logs"
    job >"$logs/job.sh"
    say "the job's log is $logs/job.log, and its tasks' logs are $logs/task-*.log"
  fi
  call sbatch "${flags[@]}" "$logs/job.sh"
}

main "$@"
