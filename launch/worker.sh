#!/usr/bin/env bash
# launch/tpu_vm.sh calls this on each worker of a TPU, from the root of the copied checkout. Linux only.
#
#   worker.sh prepare              installs Python and the pinned packages for a TPU
#   worker.sh mount SOURCE         mounts a bucket (gs://NAME[/FOLDER]) or an NFS share (HOST:/SHARE) at /mnt/xtransfer
#   worker.sh running              exits with 0 if a run is in progress
#   worker.sh run ID COMMAND …     starts the command, or finds it running; follows it, and exits with its status
#
# A run does not depend on the connection that started it. It continues when the connection is lost, and a second call with
# the same ID or the same command shows its log from the beginning.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

shared="/mnt/xtransfer"
runs="$HOME/.xtransfer-runs"

apt_install() {
  sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$@"
}

prepare() {
  if ! (find_python) >/dev/null 2>&1; then
    say "installing Python 3.11"
    apt_install python3.11 python3.11-venv || die "Python 3.11 could not be installed on $(hostname)"
  fi
  XTRANSFER_EXTRAS="tpu${XTRANSFER_EXTRAS:+,$XTRANSFER_EXTRAS}"
  set_up base
}

install_gcsfuse() { # from Google's own package repository
  local release
  release="gcsfuse-$(lsb_release -cs)"
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt $release main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt_install gcsfuse
}

mount_source() {
  local source="$1" bucket folder=""
  if mountpoint -q "$shared"; then return; fi
  sudo mkdir -p "$shared"
  sudo chown "$(id -u):$(id -g)" "$shared"
  if [[ "$source" != gs://* ]]; then
    command -v mount.nfs >/dev/null || apt_install nfs-common
    sudo mount -t nfs "$source" "$shared"
    return
  fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  bucket="${source#gs://}"
  [[ "$bucket" != */?* ]] || folder="${bucket#*/}"
  # Orbax renames checkpoint folders, and the other workers must see every write immediately.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 ${folder:+--only-dir "${folder%/}"} \
    "${bucket%%/*}" "$shared"
}

process_identity() { # pid: prints the boot id of this machine, and when the process started after that boot
  local stat fields
  stat="$(cat "/proc/$1/stat" 2>/dev/null)" || return 1
  read -ra fields <<<"${stat##*) }" # from the third field on: the second, a name in brackets, may have spaces
  printf '%s %s\n' "$(cat /proc/sys/kernel/random/boot_id)" "${fields[19]}"
}

is_alive() { # id: whether its process is alive, and not another one with the same pid after a reboot
  local pid identity
  pid="$(cat "$runs/$1/pid" 2>/dev/null)" && identity="$(process_identity "$pid")" &&
    [[ "$identity" == "$(cat "$runs/$1/born" 2>/dev/null)" ]]
}

is_running() { # id
  [[ ! -e "$runs/$1/status" ]] && is_alive "$1"
}

current() { # prints the id of the run in progress
  local id
  id="$(cat "$runs/current" 2>/dev/null)" && is_running "$id" && printf '%s\n' "$id"
}

start() { # id command ...
  local id="$1"
  shift
  printf '%s\n' "$(quoted "$@")" >"$runs/$id/command"
  : >"$runs/$id/log" # create the log before anyone reads it
  # The outer shell survives the end of the connection, and a SIGTERM for the whole machine, to write the status.
  # shellcheck disable=SC2016 # the inner shell expands it
  setsid bash -c 'trap : TERM; run="$1"; shift; status=0; "$@" || status=$?; echo "$status" >"$run/status"' \
    xtransfer-run "$runs/$id" "$@" >>"$runs/$id/log" 2>&1 </dev/null &
  process_identity "$!" >"$runs/$id/born" || true # the process may have exited already
  echo "$!" >"$runs/$id/pid"
  echo "$id" >"$runs/current"
}

run() { # id command ...
  local requested_id="$1" id="$1" other status=137 # a run that left no status was killed
  shift
  mkdir -p "$runs"
  if other="$(current)" && [[ "$other" != "$id" ]]; then
    [[ "$(cat "$runs/$other/command")" == "$(quoted "$@")" ]] ||
      die "another run is in progress on $(hostname):$(cat "$runs/$other/command"); wait for it, or kill -- -$(cat "$runs/$other/pid")"
    id="$other"
  fi
  if mkdir "$runs/$id" 2>/dev/null; then
    start "$id" "$@"
  else
    say "following the run that was started before; its log from the beginning:"
  fi
  if is_alive "$id"; then
    tail -n +1 -s 0.2 -f --pid="$(cat "$runs/$id/pid")" "$runs/$id/log"
  else
    cat "$runs/$id/log"
  fi
  [[ ! -e "$runs/$id/status" ]] || status="$(cat "$runs/$id/status")"
  say "run $requested_id ended with status $status"
  exit "$status"
}

case "${1:-}" in
  prepare) prepare ;;
  mount) mount_source "$2" ;;
  running) current >/dev/null ;;
  run) shift && run "$@" ;;
  *) die "worker.sh: '${1:-}' is not one of prepare, mount, running, run" ;;
esac
