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

from caprl_jax import objectives, programs, startup, step
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.sampling import Sampling

from .shipped import module

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
        "data.batch": 4, "caprl.group": 4, "data.train": 16, "data.heldout": 4, "eval.images": 4,
        "eval.batch": 4, "data.data_dir": str(data_dir), "seed": 0,
        "optimizer.warmup_steps": 0,
    }  # fmt: skip
    c.update_from_flattened_dict(changes)
    return c


def captions_and_rewards(config, objective, batch, key):
    """(captions, rewards [b, g]) by the functions that the step calls, with the step's own keys."""
    on, settings, policy = programs.layout(config), programs.settings(config), objective.policy
    judge, directory = startup.read_model(config.judge.path, "", np.float32)
    prompt = startup.judge_prompt(
        config, Tokenizer.from_pretrained(directory, judge.decoder.config.vocab)
    )
    judge_params = startup.load_frozen(judge, directory, on, np.float32)["decoder"]
    instruction = programs.read_instruction(judge.decoder, judge_params, prompt.instruction(), on)
    frozen = step.Frozen(judge_params, instruction)
    stop = Tokenizer.from_pretrained(objective.source, policy.decoder.config.vocab).stop

    def look(state, frozen, batch, key):
        sample_key, judge_key = jax.random.split(jax.random.fold_in(key, state.step))
        captions = step.roll_out(
            policy, settings, Sampling(**config.sampling), stop, state.params, batch, sample_key, on
        )
        verdicts = step.judged(
            judge.decoder, settings, frozen, captions.tokens, captions.mask, batch.questions,
            judge_key, on,
        )  # fmt: skip
        return captions, step.reward_terms(settings, verdicts, captions)[0]

    return jax.device_get(jax.jit(look)(objective.state, frozen, batch, key))


def hexed(values):
    """Numbers of any shape as nested lists of exact text."""
    return jax.tree.map(lambda x: float(x).hex(), np.asarray(values, np.float64).tolist())


def summed(tree):
    """[sum, sum of squares] of all numbers of a tree, in float64, as exact text."""
    flat = np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])
    return hexed([np.sum(flat), np.sum(flat**2)])


def sha256(tree):
    """Of the bytes of a tree's arrays, in the tree's order."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@pytest.fixture
def found(tmp_path, one_device):
    """What one step gives now, in the file's form."""
    config = golden_config(tmp_path)
    objective = objectives.caprl(config, SetAside())
    data = objective.data(0)
    batch = objective.place(next(data))
    data.close()
    key = jax.device_put(jax.random.key(config.seed), objective.state.step.sharding)
    before = jax.device_get(objective.state.params)
    captions, rewards = captions_and_rewards(config, objective, batch, key)
    state, metrics = jax.device_get(objective.step(objective.state, batch, key))
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
    assert here.keys() == there.keys(), (
        f"names that only one has: {sorted(here.keys() ^ there.keys())}"
    )
    apart = [
        f"{name}: golden {there[name]!r}, found {here[name]!r}"
        for name in there
        if not abs(here[name] - there[name]) <= near(name) * max(1, abs(there[name]))
    ]
    assert not apart, "these differ from the golden step:\n" + "\n".join(apart)


def mean(pair):
    """Of a (sum, count) in exact text."""
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
            assert found[name] == golden[name], f"{name} differs in some bit from the golden step"
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
