"""Sighted gain: positive for a policy that sees its images, 0 for one that doesn't, and told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.config import default
from caprl_jax.data.set_aside import SetAside
from caprl_jax.evaluate import heldout
from caprl_jax.evaluate.heldout import Written
from caprl_jax.evaluate.sight import Sight, warn_if_blind
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.step import caprl_step
from caprl_jax.run import build
from caprl_jax.run.task import Task

IMAGES, BATCH = 9, 8  # the last batch holds one image, which has no other


@pytest.fixture(scope="module")
def shipped():
    """(task, the shipped policy's parameters, true captions of held-out images)."""
    c = default()
    c.eval.images, c.eval.batch = IMAGES, BATCH
    c.data.batch, c.data.train, c.data.max_windows, c.data.max_prompt, c.data.max_question = (
        8,
        16,
        4,
        32,
        40,
    )
    task, state = build.caprl(c, SetAside(None), caprl_step)
    return task, state.params, captions_of(task)


def captions_of(task: Task) -> list[Written]:
    """Two captions an image: the true one, and its beginning."""
    from caprl_jax.data.tokens import Tokenizer

    tokenizer = Tokenizer.from_pretrained(task.source, 4096)
    texts = heldout.true_captions(task.heldout)
    ids = [tokenizer.encode_caption(text) for text in texts]
    return [Written(i, "", part) for i, row in enumerate(ids) for part in (row, row[:5])]


def blind(params):
    """The parameters, with image features that are all 0."""
    merger = jax.tree.map(jnp.zeros_like, params["vision"]["merger"])
    return params | {"vision": params["vision"] | {"merger": merger}}


def logps(task, params, captions):
    """log p(caption | image) of the first batch: a function of (image, caption), one at a time."""
    batches, longest = task.heldout.batches, max(len(c.ids) for c in captions)

    @jax.jit
    def compute(batch, captions):
        return jnp.sum(caption_logps(task.policy, params, batch, captions)[0])

    def logp(image, caption):
        ids = np.pad(caption.ids, (0, longest - len(caption.ids)))[None, None]
        written = heldout.Captions(ids, (np.arange(longest) < len(caption.ids))[None, None])
        return float(compute(jax.tree.map(lambda a: a[image : image + 1], batches[0]), written))

    return logp


def test_the_gain_is_the_mean_over_captions_of_a_difference_between_two_images(shipped):
    task, params, captions = shipped
    logp = logps(task, params, captions)
    gains = [
        [logp(i, c) - logp((i - 1) % BATCH, c) for c in captions[2 * i : 2 * i + 2]]
        for i in range(BATCH)
    ]
    of_image = np.mean(gains, axis=1)
    measured = Sight(task.policy, task.heldout, task.rules).measure(params, captions)
    assert measured["sighted_gain"] == pytest.approx(np.mean(of_image), rel=1e-4)
    error = np.std(of_image, ddof=1) / np.sqrt(BATCH)
    assert measured["sighted_gain_error"] == pytest.approx(error, rel=1e-4)


def test_a_policy_that_sees_gains_and_a_blind_one_is_warned_about(shipped, caplog):
    task, params, captions = shipped
    sight = Sight(task.policy, task.heldout, task.rules)
    seeing, unseeing = sight.measure(params, captions), sight.measure(blind(params), captions)
    assert seeing["sighted_gain"] > 1 and seeing["sighted_gain"] > 4 * seeing["sighted_gain_error"]
    assert abs(unseeing["sighted_gain"]) < 1e-4
    warn_if_blind(seeing)
    assert not caplog.messages
    warn_if_blind(unseeing)
    (told,) = caplog.messages
    assert told.startswith("the policy may not see its images")


def test_one_image_has_no_other(shipped):
    task, params, captions = shipped
    held = task.heldout
    alone = heldout.HeldOut(held.records[:1], held.presented[:1], [held.batches[1]])
    assert Sight(task.policy, alone, task.rules).measure(params, captions[:2]) == {}
    warn_if_blind({})
