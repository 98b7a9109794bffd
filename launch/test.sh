#!/usr/bin/env bash
# Installs the pinned packages with the test extras into .venv (once) and runs the tests.
#
#   launch/test.sh               all of them, on all cores
#   launch/test.sh tests/data    some of them, in one process; every argument goes to pytest
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up base test
cd "$root"
[[ $# -gt 0 ]] || set -- -n auto --dist worksteal
say "python -m pytest$(quoted "$@")"
exec "$python" -m pytest "$@"
