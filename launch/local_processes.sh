#!/usr/bin/env bash
# Runs an experiment as several processes on this machine, as a pod does on several machines.
#
#   launch/local_processes.sh N [flags]                                    N processes, one device each
#   launch/local_processes.sh 2 --config configs/quickstart.py --workdir runs/two
#   XTRANSFER_DEVICES_PER_PROCESS=4 launch/local_processes.sh 2 [flags]    2 × 4 virtual CPU devices
#   launch/local_processes.sh N --dry-run [flags]                          print the commands, run none
#
# Every flag goes to `python -m xtransfer.main` of each process; --config and --workdir default as in launch/local.sh.
# Process I logs to WORKDIR.logs/process-I.log, and the first one's log is shown too. If one fails, the others are ended.
# Ctrl-C and SIGTERM go to all. The script exits with the status of the first process that failed (143: preempted,
# 130: Ctrl-C).
#
# XTRANSFER_DEVICES_PER_PROCESS  virtual CPU devices of each process (default: 1)
# XTRANSFER_PORT                 process 0 listens here (default: a free port)
# XTRANSFER_GRACE_SECONDS        seconds from a failure to SIGTERM for the others, and from there to SIGKILL
#                                (default: 60)
# JAX_PLATFORMS                  the devices (default: cpu)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

free_port() { # prints a port where nobody answers
  local port
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    port=$((20000 + RANDOM % 12000))
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  die "no free port was found: name one with XTRANSFER_PORT"
}

process() { # index: becomes that process
  local -a words=("$python" -m xtransfer.main --coordinator "127.0.0.1:$port" --processes "$count" --process "$1")
  call env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "XLA_FLAGS=$xla_flags" "${words[@]}" "${main_flags[@]}"
}

start() { # index: in a group of its own, so that Ctrl-C comes here first; sends its status through the pipe
  set -m
  (
    trap : INT TERM # only the process reacts to signals; this shell survives to report its exit status
    status=0
    if [[ $1 -eq 0 ]]; then
      process 0 2>&1 | (trap '' INT TERM && exec tee "$logs/process-0.log") || status=$?
    else
      process "$1" >"$logs/process-$1.log" 2>&1 || status=$?
    fi
    echo "$1 $status" >&3
  ) </dev/null &
  set +m
  pids+=("$!")
}

signal_all() { # signal
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}

await() { # waits for all processes; sets $result to the status of the first that failed
  local index status ended=0 deadline="" next=TERM all_exited=false repeated=false started=$SECONDS
  while [[ $ended -lt $count ]]; do
    if ! read -r -t 1 index status <&3; then # nothing yet, or a signal
      # A shell that was just starting its process ignores a signal, so an early one is sent twice.
      if [[ -n "$signalled" ]] && ! $repeated && [[ $((SECONDS - started)) -lt 10 ]]; then
        repeated=true
        signal_all "$signalled"
      fi
      if [[ -n "$deadline" && $SECONDS -ge $deadline ]]; then
        signal_all "$next"
        next=KILL deadline=$((SECONDS + grace))
      fi
      any_alive && continue
      ! $all_exited || break
      all_exited=true # read once more: the last process may just have reported its status
      continue
    fi
    ended=$((ended + 1))
    [[ $status -ne 0 && $result -eq 0 ]] || continue
    [[ "$signalled" != INT ]] || status=130 # Python may make another error of a Ctrl-C that comes while it imports
    # The others notice, say why, and end by themselves. Those that do not are ended.
    result=$status
    deadline=$((SECONDS + grace))
    if [[ $status -ne 143 && $status -ne 130 ]]; then
      say "process $index failed with status $status (log: $logs/process-$index.log)"
      [[ $index -eq 0 ]] || tail -n 3 "$logs/process-$index.log" >&2
    fi
  done
  [[ $ended -lt $count && $result -eq 0 ]] || return 0
  case "$signalled" in # a process interrupted at its start reports no status
    INT) result=130 ;;
    TERM) result=143 ;;
    *) result=1 && say "a process ended without a status (logs: $logs)" ;;
  esac
}

any_alive() {
  local pid
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then return 0; fi
  done
  return 1
}

check_whole_number() { # variable and value, which must be a whole number
  [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$1: '$2' is not a number from 0 (at most nine digits, no leading zero)"
}

add_defaults() { # --config and --workdir as in launch/local.sh
  local config
  config="$(flag_of_main config)"
  if [[ -z "$config" ]]; then
    config="$root/configs/quickstart.py"
    main_flags=(--config "$config" ${main_flags[@]+"${main_flags[@]}"})
  fi
  workdir="$(flag_of_main workdir)"
  if [[ -z "$workdir" ]]; then
    config="$(basename -- "$config")"
    config="${config/.py/}"
    workdir="runs/${config//[^A-Za-z0-9._-]/-}"
    main_flags+=(--workdir "$workdir")
  fi
}

main() {
  local index
  local -a words=()
  while [[ $# -gt 0 && "$1" != -- ]]; do # accept --dry-run anywhere before --
    if [[ "$1" == --dry-run ]]; then dry_run=true; else words+=("$1"); fi
    shift
  done
  set -- ${words[@]+"${words[@]}"} "$@"
  case "${1:-}" in -h | --help) usage && exit 0 ;; esac
  [[ "${1:-}" =~ ^[1-9][0-9]{0,2}$ && "$1" -le 256 ]] ||
    die "how many processes? '${1:-}' is not a number from 1 to 256: launch/local_processes.sh N [flags]"
  check_whole_number XTRANSFER_DEVICES_PER_PROCESS "$devices"
  check_whole_number XTRANSFER_GRACE_SECONDS "$grace"
  count=$1
  shift
  main_flags=("$@")
  add_defaults
  logs="${workdir%/}.logs"
  port="${XTRANSFER_PORT:-$(free_port)}"
  xla_flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  if $dry_run; then
    for ((index = 0; index < count; index++)); do process "$index"; done
    return
  fi
  set_up base
  mkdir -p "$logs"
  say "$count × python -m xtransfer.main --coordinator 127.0.0.1:$port$(quoted "${main_flags[@]}")"
  trap 'signalled=INT && signal_all INT' INT
  trap 'signalled=TERM && signal_all TERM' TERM
  mkfifo "$logs/ended"
  exec 3<>"$logs/ended"
  rm -f "$logs/ended"
  for ((index = 0; index < count; index++)); do start "$index"; done
  [[ -z "$signalled" ]] || signal_all "$signalled" # the signal came before all processes had started
  await
  exit "$result"
}

devices="${XTRANSFER_DEVICES_PER_PROCESS:-1}" grace="${XTRANSFER_GRACE_SECONDS:-60}"
count=0 port="" xla_flags="" workdir="" logs="" signalled="" result=0 pids=()
main "$@"
