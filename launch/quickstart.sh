#!/usr/bin/env bash
# Runs the main job on the embedded default: handwritten digits, tiny policy and judge, on CPU.
# Usage: bash launch/quickstart.sh [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup_venv.sh ""
exec "$VENV/bin/python" -m caprl_jax.main --config=configs/tiny.py "$@"
