#!/usr/bin/env bash
# Makes the tiny policy, judge, verifier and CLIP that ship in caprl_jax/assets/tiny, from random weights.
# Usage: bash launch/make_tiny.sh DIR          about 130 minutes on 2 cores, reckoned
set -euo pipefail
out="$(realpath -m "${1:?usage: bash launch/make_tiny.sh DIR}")"
cd "$(dirname "$0")/.."
source launch/setup_venv.sh ""
train() { "$VENV/bin/python" -m caprl_jax.main "--config=configs/$1" "--workdir=$2" "--config.policy.path=$3"; }
"$VENV/bin/python" -m caprl_jax.tiny_models --out="$out/untrained"
train tiny_policy.py "$out/policy" "$out/untrained/policy"
train tiny_judge.py:recall "$out/recall" "$out/untrained/judge"
train tiny_judge.py:letters "$out/letters" "$out/recall/export/2000"
train tiny_verifier.py "$out/verifier" "$out/policy/export/2000"
mkdir -p "$out/tiny"
cp -r "$out"/policy/export/* "$out/tiny/policy"
cp -r "$out"/letters/export/* "$out/tiny/judge"
cp -r "$out"/verifier/export/* "$out/tiny/verifier"
"$VENV/bin/python" -m caprl_jax.tiny_clip --out="$out/tiny/clip" --policy="$out/tiny/policy"
echo "made $out/tiny: copy it to caprl_jax/assets/tiny to ship it"
