#!/usr/bin/env bash
# Plans every shipped config for its topologies and prints the table of caprl_jax/plan/README.md; neither TPU nor GPU
# is needed. Usage: bash launch/plans.sh DIR     (2 to 9 minutes a plan on 2 cores; plans in DIR are kept, and the
# compilers' environment, unless VENV names one). SCALING=1 adds plans of the same work a chip on more chips.
set -euo pipefail
out="$(realpath -m "${1:?usage: bash launch/plans.sh DIR}")"
cd "$(dirname "$0")/.."
mkdir -p "$out"
export VENV="${VENV:-$out/venv}" # of its own: see caprl_jax/plan/README.md
source launch/setup_venv.sh "[plan,plan-gpu]"
plans=()
plan() { # name, config, topology, overrides
  local file="$out/$1.json"
  plans+=("$file")
  [ -s "$file" ] && return
  # A plan that doesn't fit fails, and has its row all the same.
  "$VENV/bin/python" -m caprl_jax.plan "--config=configs/$2" "--topology=$3" "--json=$file" "${@:4}" \
    > "$out/$1.txt" 2> "$out/$1.log" || [ -s "$file" ] || { cat "$out/$1.log" >&2; return 1; }
  cat "$out/$1.txt"
}
plan 3b_v5e_16 3b.py:v5e_16 v5e:4x4
plan 3b_v6e_16 3b.py:v6e_16 v6e:4x4
plan 3b_v5p_8 3b.py:v5p_8 v5p:2x2x2
plan 3b_v5p_64 3b.py:v5p_64 v5p:4x4x4
plan 7b_v5p_16 7b.py:v5p_16 v5p:2x2x4
plan 7b_v5e_64 7b.py:v5e_64 v5e:8x8
plan qwen3vl_2b_v5e_16 qwen3vl_2b.py:v5e_16 v5e:4x4
plan qwen3vl_4b_v5e_16 qwen3vl_4b.py:v5e_16 v5e:4x4
plan 3b_h100_1 3b.py h100:1
plan 3b_h100_8 3b.py h100:8
plan 3b_h100_32 3b.py 'h100:8*4'
plan 3b_h200_1 3b.py:h200 h200:1
plan 3b_h200_8 3b.py:h200_8 h200:8
plan 3b_b200_8 3b.py b200:8
plan 7b_h100_8 7b.py h100:8
plan qwen3vl_4b_h100_8 qwen3vl_4b.py h100:8
if [ "${SCALING:-}" ]; then # the same work a chip on 16 and 256 TPUs, and on 8 and 256 GPUs
  plan 3b_v5e_256 3b.py:v5e_16 v5e:16x16 --config.mesh.data=16 --config.mesh.fsdp=4 --config.data.batch=2048 --config.eval.batch=256
  plan 3b_v5p_16 3b.py:v5p_8 v5p:2x2x4
  plan 3b_v5p_256 3b.py:v5p_8 v5p:4x8x8 --config.mesh.data=16 --config.mesh.fsdp=4 --config.data.batch=2048 --config.eval.batch=256
  plan 3b_h100_256 3b.py 'h100:8*32' --config.data.batch=4096 --config.eval.batch=256
fi
"$VENV/bin/python" -m caprl_jax.plan_table "${plans[@]}"
