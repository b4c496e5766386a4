#!/usr/bin/env bash
# Checks kernels, memory and pace on one machine with a GPU in under 9 minutes, and writes one JSON file.
# It needs JAX for GPUs and the packages flax, optax, chex, ml_collections and absl-py; nothing is downloaded.
# Usage: bash launch/gpu_check.sh FILE.json [flags]    (PYTHON: interpreter; CONFIG: default configs/3b.py:h200)
set -euo pipefail
out="$(realpath -m "${1:?usage: bash launch/gpu_check.sh FILE.json}")"
cd "$(dirname "$0")/.."
exec timeout 530 "${PYTHON:-python3}" -m caprl_jax.bench.gpu_check \
  "--config=${CONFIG:-configs/3b.py:h200}" "--json=$out" "${@:2}"
