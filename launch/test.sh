#!/usr/bin/env bash
# Installs the pinned packages with the test extras into .venv (once) and runs the tests.
#
#   launch/test.sh                          all of them
#   launch/test.sh tests/test_packing.py    some of them; every argument goes to pytest
#   launch/test.sh -n 2                     on two processes
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up base test
cd "$root"
say "python -m pytest$(quoted "$@")"
exec "$python" -m pytest "$@"
