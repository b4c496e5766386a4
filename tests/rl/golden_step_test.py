"""One step of the shipped tiny models gives what tests/golden/step.json remembers.

The file holds for the XLA flags that conftest.py sets and for one CPU device. The environment has
two switches: CAPRL_GOLDEN_WRITE=1 writes the file anew, and CAPRL_GOLDEN_EXACT=1 asks for equality
to the last bit, which the machine that wrote the file should give.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.data.set_aside import SetAside
from caprl_jax.rl.step import caprl_step, step_keys
from caprl_jax.rl.types import Scored
from caprl_jax.run import build

from ..shipped import module

FILE = Path(__file__).parent / "golden" / "step.json"
NEAR = 1e-6  # relative, and absolute near zero: another CPU may round otherwise
# What has passed through Adam: it makes whole steps of gradients that are nearly rounding errors.
NEAR_AFTER = 1e-4
AFTER = ("moved", "entropy", "kl", "loss", "grad_norm", "clip_fraction")
GAP = 1e-5  # logp_gap is a mean of rounding errors alone: it is only asked to be small


def golden_config(data_dir):
    """configs/tiny.py with a batch of 4 images, 4 captions each.

    Without a warm-up the first update moves the policy, so that the second one has a KL.
    """
    c = module("tiny").get_config()
    changes = {
        "data.batch": 4,
        "caprl.group": 4,
        "data.train": 16,
        "data.heldout": 4,
        "eval.images": 4,
        "eval.batch": 4,
        "data.data_dir": str(data_dir),
        "seed": 0,
        "optimizer.warmup_steps": 0,
    }
    c.update_from_flattened_dict(changes)
    return c


def look(run, state, batch, key):
    """(captions, rewards) by the functions that the step calls, with the step's own keys."""
    rollout_key, judge_key = step_keys(jax.random.fold_in(key, state.step))
    captions = run.verbs.rollout(
        run.learner.policy, state.params, batch, decoding=run.decoding, key=rollout_key
    )
    verdicts = run.verbs.judge(
        run.judge, captions, batch.questions, judging=run.judging, key=judge_key
    )
    rewards = run.verbs.reward(run.rewards, Scored(batch, captions, verdicts, run.models(state)))
    return captions, rewards.total


def hexed(values):
    """Numbers of any shape as nested lists of exact text."""
    return jax.tree.map(lambda x: float(x).hex(), np.asarray(values, np.float64).tolist())


def summed(tree):
    """[sum, sum of squares] of all numbers of a tree, in float64, as exact text."""
    flat = np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])
    return hexed([np.sum(flat), np.sum(flat**2)])


def sha256(tree):
    """The hash of the bytes of a tree's arrays, in the tree's order."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@pytest.fixture
def found(tmp_path, one_device):
    """The results of one step now, in the file's form."""
    config = config_lib.complete(golden_config(tmp_path))
    task, state = build.caprl(config, SetAside(), caprl_step)
    data = task.data(0)
    batch = task.place(next(data))
    data.close()
    key = jax.device_put(jax.random.key(config.seed), state.step.sharding)
    before = jax.device_get(state.params)
    captions, rewards = jax.device_get(jax.jit(look)(task.run, state, batch, key))
    state, metrics = jax.device_get(task.step(state, batch, key))
    moved = jax.tree.map(np.subtract, state.params, before)
    return {
        "tokens": [
            [own[real].tolist() for own, real in zip(*image)]
            for image in zip(captions.tokens, captions.mask)
        ],
        "rewards": hexed(rewards),
        "metrics": {name: hexed(pair) for name, pair in sorted(metrics.items())},
        "parameters": {name: summed(part) for name, part in sorted(state.params.items())},
        "moved": {name: summed(part) for name, part in sorted(moved.items())},
        "sha256": sha256(state.params),
    }


def numbers(tree):
    """{path: number} of a tree of exact texts."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): float.fromhex(text) for path, text in leaves}


def near(name):
    """The bound for a number of this path."""
    return NEAR_AFTER if any(f"'{part}'" in name for part in AFTER) else NEAR


def assert_near(found, golden):
    """Every float is near the golden one; the message names all that are not."""
    here, there = numbers(found), numbers(golden)
    assert here.keys() >= there.keys(), f"missing: {sorted(there.keys() - here.keys())}"
    apart = [
        f"{name}: golden {there[name]!r}, found {here[name]!r}"
        for name in there
        if not abs(here[name] - there[name]) <= near(name) * max(1, abs(there[name]))
    ]
    assert not apart, "these differ from the golden step:\n" + "\n".join(apart)


def mean(pair):
    """The mean of a (sum, count) in exact text."""
    total, count = map(float.fromhex, pair)
    return total / count


def test_a_step_is_the_golden_one(found):
    """Tokens are equal, floats are near; with CAPRL_GOLDEN_EXACT=1 all is equal to the last bit."""
    if os.environ.get("CAPRL_GOLDEN_WRITE") == "1":
        FILE.parent.mkdir(exist_ok=True)
        lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in found]
        FILE.write_text("{" + ",\n".join(lines) + "}\n")
    golden = json.loads(FILE.read_text())
    assert found["tokens"] == golden["tokens"], "the captions' tokens differ from the golden step's"
    if os.environ.get("CAPRL_GOLDEN_EXACT") == "1":
        for name in golden:
            own = found[name]
            if name == "metrics":  # there may be new ones
                own = {key: own[key] for key in golden[name]}
            assert own == golden[name], f"{name} differs in some bit from the golden step"
    # What the step measured is of the captions and rewards that are pinned beside it.
    metrics = found["metrics"]
    real = [t for image in found["tokens"] for one in image for t in one]
    assert float.fromhex(metrics["caption_length"][0]) == len(real)
    rewards = list(numbers(found["rewards"]).values())
    assert mean(metrics["reward"]) == pytest.approx(np.mean(rewards), rel=1e-5)
    gaps = [mean(each["metrics"].pop("logp_gap")) for each in (found, golden)]
    assert max(gaps) < GAP, f"rollout and update disagree on log-probabilities: {gaps}"
    pinned = ("rewards", "metrics", "parameters", "moved")
    assert_near({name: found[name] for name in pinned}, {name: golden[name] for name in pinned})
