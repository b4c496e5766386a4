#!/usr/bin/env bash
# Runs the tests, files at a time in two processes. Usage: bash launch/test.sh [pytest's arguments];
# -m "" adds the slow ones.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup_venv.sh "[test]"
exec "$VENV/bin/python" -m pytest -m "not slow" -n 2 --dist loadfile "$@"
