# Sourced by the scripts that launch on other machines: flags, --dry-run, and waiting.
# shellcheck shell=bash
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

dry_run=false
main_flags=() # the flags after --, for xtransfer.main
passed=()     # the values of flags for another tool, such as --create-flag

poll="${XTRANSFER_POLL_SECONDS:-30}" # seconds between two polls, and the first pause of a back-off

usage() { # prints the comment at the head of the running script
  sed -n '2,/^set -euo/p' "$0" | sed -e '$d' -e 's/^# \{0,1\}//'
}

shell_words() { # prints the arguments for a shell, in single quotes if necessary
  local word single="'" escaped="'\\''" line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//$single/$escaped}'"
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

call() { # runs a command; with --dry-run prints it, so that it can be pasted
  if $dry_run; then shell_words "$@"; else "$@"; fi
}

parse_flags() { # "flags with a value" "switches" arguments ...: sets a variable per flag, and main_flags from after --
  local valued=" $1 " switches=" $2 " word value
  shift 2
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --) shift && main_flags=("$@") && return ;;
      -h | --help) usage && exit 0 ;;
    esac
    [[ "$1" =~ ^--([a-z]+(-[a-z]+)*)(=|$) ]] ||
      die "unexpected argument '$1' (see --help); the flags of xtransfer.main come after --"
    word="${BASH_REMATCH[1]}"
    if [[ "$switches" == *" $word "* && "$1" != *=* ]]; then
      printf -v "${word//-/_}" true
      shift && continue
    fi
    [[ "$valued" == *" $word "* ]] || die "unknown flag '$1' (see --help); the flags of xtransfer.main come after --"
    if [[ "$1" == *=* ]]; then
      value="${1#*=}" && shift
    else
      [[ $# -ge 2 ]] || die "--$word: a value is missing"
      value="$2" && shift 2
    fi
    [[ "$value" != --* || ("$word" == *-flag && "$value" != --) ]] || die "--$word: a value is missing before '$value'"
    case "$word" in
      *-flag) passed+=("$value") ;;
      *) printf -v "${word//-/_}" %s "$value" ;;
    esac
  done
}

required() { # names of flags that are required
  local flag variable
  for flag in "$@"; do
    variable="${flag//-/_}"
    [[ -n "${!variable}" ]] || die "--$flag is missing (see --help)"
  done
}

check_number() { # flag, value, minimum; refuses 08, which bash reads as octal
  [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ && "$2" -ge "$3" ]] ||
    die "--$1: '$2' is not a number from $3 (at most nine digits, no leading zero)"
}

require_main_flags() { # names of flags that are required after --
  local flag value
  for flag in "$@"; do
    value="$(flag_of_main "$flag")"
    [[ -n "$value" && "$value" != --* ]] || die "--$flag is missing among the flags of xtransfer.main, after --"
  done
}

is_below() { # folder path
  [[ "$2" == "$1"/?* && "$2/" != */../* ]]
}

flag_of_main() { # name: prints the last value of --name in main_flags, or nothing
  local name="$1" argument previous="" value=""
  for argument in ${main_flags[@]+"${main_flags[@]}"}; do
    if [[ "$previous" == "--$name" ]]; then
      value="$argument" previous=""
      continue
    fi
    [[ "$argument" != "--$name="* ]] || value="${argument#*=}"
    previous="$argument"
  done
  printf '%s\n' "$value"
}

default_platform() { # platform: the one that xtransfer.main requires, unless the flags name another
  [[ -n "$(flag_of_main config.platform)" ]] || main_flags=("--config.platform=$1" "${main_flags[@]}")
}

pause() { # attempt, from 1: waits longer each time, up to sixteen times the first pause
  local doublings=$(($1 < 5 ? $1 - 1 : 4))
  sleep $((poll << doublings))
}
