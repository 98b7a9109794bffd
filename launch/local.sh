#!/usr/bin/env bash
# Installs the pinned packages into .venv (once) and runs an experiment on this machine.
#
#   launch/local.sh                                          the quickstart
#   launch/local.sh --config configs/files.py --workdir DIR  another experiment
#   launch/local.sh --config.student.learning_rate=1e-4      the quickstart with a changed value
#   XTRANSFER_EXTRAS=tpu launch/local.sh                     the quickstart with the packages for a TPU (or cuda)
#
# Every flag goes to `python -m xtransfer.main`. --config defaults to this repository's configs/quickstart.py, and
# --workdir to runs/NAME in the current directory, where NAME is the config's.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config="" has_config=false has_workdir=false previous=""
for argument in "$@"; do
  case "$previous" in
    --config) config="$argument" previous="" && continue ;;
    --workdir) previous="" && continue ;;
  esac
  case "$argument" in
    --) break ;;
    --config) has_config=true previous="$argument" ;;
    --config=*) has_config=true config="${argument#*=}" ;;
    --workdir) has_workdir=true previous="$argument" ;;
    --workdir=*) has_workdir=true ;;
    *) previous="" ;; # --config.key=value among them: a value, not a file
  esac
done

defaults=()
if ! $has_config; then
  config="$root/configs/quickstart.py"
  defaults+=(--config "$config")
fi
if ! $has_workdir; then
  name="$(basename -- "$config")"
  name="${name/.py/}"
  name="${name//[^A-Za-z0-9._-]/-}" # configs/pretrain.py:english -> pretrain-english
  defaults+=(--workdir "runs/${name:-experiment}")
fi

# On a CPU, XLA's buffers come from glibc's malloc. Buffers that it keeps cost no page faults when they are reused.
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-1073741824}"

set_up base
say "python -m xtransfer.main$(quoted ${defaults[@]+"${defaults[@]}"} "$@")"
exec "$python" -m xtransfer.main ${defaults[@]+"${defaults[@]}"} "$@"
