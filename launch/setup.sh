# Sourced by the launch scripts: makes a .venv with the pinned packages in the repository's root.
# shellcheck shell=bash
#
# set_up base [extra ...]   makes or repairs .venv, installs what is missing, and sets $python to its interpreter.
#
# PYTHON            the interpreter that makes .venv (default: the first Python >= 3.11 on the PATH)
# XTRANSFER_EXTRAS  more extras of setup.cfg, separated by commas: tpu, cuda, dev, …
#
# For every extra, a stamp in .venv holds the files that decide what is installed, and the path of this repository, to
# which the installation points. It is written last. So a second start with the same files in the same place installs
# nothing, and a failed or killed installation never counts as complete.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"
stamps="$venv/xtransfer-stamps"
installing="$root/.venv.installing"

quoted() { if [[ $# -gt 0 ]]; then printf ' %q' "$@"; fi; }

say() { printf 'xtransfer: %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

is_new_enough() { # "3.11" or later
  local major="${1%%.*}" minor="${1#*.}"
  [[ "$major" -gt 3 || ("$major" -eq 3 && "$minor" -ge 11) ]]
}

find_python() { # prints an interpreter of 3.11 or later
  local candidate version rejected=""
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
    if version="$(version_of "$candidate")"; then
      if is_new_enough "$version"; then
        printf '%s\n' "$candidate"
        return
      fi
      rejected="$rejected${rejected:+, }$candidate is $version"
    elif [[ "$candidate" == "${PYTHON:-}" ]]; then
      rejected="$candidate does not run"
    fi
    # A user who names an interpreter wants that one or none.
    [[ -z "${PYTHON:-}" ]] || break
  done
  die "Python 3.11 or newer is needed (${rejected:-no python3 found}): install it, or name it with PYTHON=/path/to/python3.11"
}

expected_stamp() {
  cat "$root/setup.cfg" "$root/pyproject.toml" "$root/launch/requirements.lock"
  printf 'root = %s\n' "$(cd "$root" && pwd -P)" # the same through a symbolic link
}

check_extra() {
  local known
  known="$(sed -n '/^\[options.extras_require\]/,/^\[options.packages/s/^\([a-z0-9]*\) *=$/\1/p' "$root/setup.cfg")"
  if ! grep -qxF -- "$1" <<<"$known"; then
    die "XTRANSFER_EXTRAS: setup.cfg has no extra '$1', only ${known//$'\n'/, }"
  fi
}

claim() { # allows one installation at a time; after a killed one, starts from scratch
  local owner
  if (set -o noclobber && echo "$$" >"$installing") 2>/dev/null; then return; fi
  owner="$(cat "$installing" 2>/dev/null)" || die "cannot write $installing: is $root writable?"
  if [[ "$owner" =~ ^[0-9]+$ ]] && kill -0 "$owner" 2>/dev/null; then
    die "process $owner is installing into $venv: wait until it is done, or remove $installing"
  fi
  say "an earlier installation was interrupted; recreating .venv"
  echo "$$" >"$installing"
  rm -rf "$venv"
}

make_venv() {
  local base version
  if [[ -d "$venv" ]] && version="$(version_of "$python")" && is_new_enough "$version"; then return; fi
  base="$(find_python)" || { rm -f "$installing" && exit 1; }
  say "making .venv with $base ($(version_of "$base"))"
  "$base" -m venv --clear "$venv" || die "$base -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
}

install() { # extras to add; "base" stands for none
  local extra list=""
  for extra in "$@"; do
    [[ "$extra" == base ]] || list="$list${list:+,}$extra"
  done
  say "installing the pinned packages${list:+ with $list} (once; a few minutes)"
  cd "$root" &&
    "$python" -m pip install --disable-pip-version-check --quiet --constraint launch/requirements.lock pip &&
    "$python" -m pip install --constraint launch/requirements.lock --editable ".${list:+[$list]}"
}

set_up() {
  local extra stamp status
  local -a extras missing=()
  IFS=', ' read -r -a extras <<<"$* ${XTRANSFER_EXTRAS:-}"
  stamp="$(expected_stamp)"
  for extra in "${extras[@]}"; do
    [[ -n "$extra" ]] || continue
    [[ "$extra" == base ]] || check_extra "$extra"
    [[ "$(cat "$stamps/$extra" 2>/dev/null)" == "$stamp" ]] || missing+=("$extra")
  done
  if [[ ${#missing[@]} -eq 0 && ! -e "$installing" ]] && version_of "$python" >/dev/null; then return; fi
  # Without these traps, bash would continue after pip was interrupted.
  trap 'exit 130' INT
  trap 'exit 143' TERM
  claim
  make_venv
  # .venv may just have been cleared, so ask for everything.
  status=0
  (install "${extras[@]}") >&2 || status=$?
  if [[ $status -ne 0 ]]; then
    # If pip ends by itself, .venv stays usable; if it is killed, perhaps not.
    [[ $status -gt 128 ]] || rm -f "$installing"
    die "the packages could not be installed (pip's message is above); the same command tries again"
  fi
  mkdir -p "$stamps"
  for extra in "${extras[@]}"; do
    [[ -z "$extra" ]] || printf '%s\n' "$stamp" >"$stamps/$extra"
  done
  rm -f "$installing"
  trap - INT TERM
}
