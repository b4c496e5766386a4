"""The tree is exact: it equals the computation that repeats every ancestor for every branch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import judge, rollout, step
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.policy import text_positions

GROUP, STOP = 3, (5, 7)
SAMPLING = rollout.Sampling(max_tokens=9)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.fixture(scope="module")
def captions(world):
    draw = jax.jit(lambda p, batch, key: rollout.sample(
        world.policy, p, batch.images, batch.prompt, key, GROUP, STOP, SAMPLING
    ))  # fmt: skip
    found = draw(world.params, world.batch, jax.random.key(3))
    # The cases below mean something only if captions end at different places.
    assert len(set(np.asarray(found.length).ravel())) > 2
    return found


def naive_logps(world, params, image: int, tokens, mask):
    """One caption by itself: image, prompt and caption in one sequence, no past, all logits."""
    one = jax.tree.map(lambda a: a[image : image + 1], world.batch)
    policy, prompt = world.policy, one.prompt
    decoder = {"params": params["decoder"]}
    features = policy.vision.apply({"params": params["vision"]}, one.images)[0]
    text = policy.decoder.apply(decoder, prompt.tokens[0], method=Decoder.embed)
    at = jnp.maximum(prompt.feature[0], 0)
    x = jnp.where((prompt.feature[0] >= 0)[:, None], features[at], text)
    p = int(np.sum(prompt.mask))  # padding cut off, so nothing is masked but the future
    t = int(np.sum(mask))
    caption = policy.decoder.apply(decoder, tokens[:t], method=Decoder.embed)
    x = jnp.concatenate([x[:p], caption])
    after = text_positions(prompt.next_position[0], t, True)
    positions = jnp.concatenate([jnp.asarray(prompt.positions[0, :p]), after])
    hidden, _ = policy.decoder.apply(decoder, x, positions, jnp.ones(p + t, bool))
    logp = jax.nn.log_softmax(policy.decoder.apply(decoder, hidden, method=Decoder.logits))
    return jnp.take_along_axis(logp[p - 1 : p + t - 1], tokens[:t, None], axis=1)[:, 0]


def test_rollout_logps_equal_naive(world, captions):
    for b, g in np.ndindex(captions.length.shape):
        naive = naive_logps(world, world.params, b, captions.tokens[b, g], captions.mask[b, g])
        assert relative(captions.logp[b, g, : len(naive)], naive) <= 1e-5


def test_update_logps_equal_naive(world, captions):
    logp, _ = step.caption_logps(world.policy, world.params, world.batch, captions)
    for b, g in np.ndindex(captions.length.shape):
        naive = naive_logps(world, world.params, b, captions.tokens[b, g], captions.mask[b, g])
        assert relative(logp[b, g, : len(naive)], naive) <= 1e-5


def test_gradients_of_every_parameter_equal_naive(world, captions):
    weight = np.random.default_rng(0).normal(size=captions.logp.shape).astype(np.float32)

    def tree(params):
        logp, _ = step.caption_logps(world.policy, params, world.batch, captions)
        return jnp.sum(jnp.where(captions.mask, weight * logp, 0))

    def naive(params):
        total = 0.0
        for b, g in np.ndindex(captions.length.shape):
            logp = naive_logps(world, params, b, captions.tokens[b, g], captions.mask[b, g])
            total += jnp.sum(weight[b, g, : len(logp)] * logp)
        return total

    found, expected = jax.jit(jax.grad(tree))(world.params), jax.grad(naive)(world.params)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    assert len(paths) > 30
    for (path, want), got in zip(paths, jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        if "'k'" in name and "bias" in name:
            # A key bias shifts all scores of a query alike, up to its rotation: nearly no gradient.
            assert np.max(np.abs(got - want)) <= 1e-5 * max(1.0, float(np.max(np.abs(want)))), name
        else:
            assert np.max(np.abs(want)) > 0, name
            assert relative(got, want) <= 1e-5, name


def test_letter_logits_equal_naive(world, captions):
    frozen, batch = world.frozen, world.batch
    found = judge.letter_logits(
        world.judge,
        frozen.judge,
        frozen.instruction,
        captions.tokens,
        captions.mask,
        batch.questions,
    )
    variables = {"params": frozen.judge}
    for b, g, n in np.ndindex(found.shape[:3]):
        caption = np.asarray(captions.tokens[b, g])[np.asarray(captions.mask[b, g])]
        caption = caption[~np.isin(caption, frozen.instruction.special)]
        question = batch.questions.tokens[b, n][batch.questions.mask[b, n]]
        ids = jnp.concatenate([frozen.instruction.tokens, caption, question])
        x = world.judge.apply(variables, ids, method=Decoder.embed)
        hidden, _ = world.judge.apply(variables, x, jnp.arange(len(ids)), jnp.ones(len(ids), bool))
        logits = world.judge.apply(variables, hidden[-1], method=Decoder.logits)
        assert relative(found[b, g, n], logits[frozen.instruction.letters]) <= 1e-5


def test_questions_of_their_own_equal_shared_ones(world, captions):
    """[b, g, n] questions that repeat an image's set score as the shared [b, n] set does."""
    args = world.judge, world.frozen.judge, world.frozen.instruction, captions.tokens, captions.mask
    shared = judge.letter_logits(*args, world.batch.questions)
    own = jax.tree.map(lambda a: np.repeat(a[:, None], GROUP, axis=1), world.batch.questions)
    np.testing.assert_allclose(judge.letter_logits(*args, own), shared, rtol=1e-5, atol=1e-6)


def test_special_tokens_never_reach_the_judge(world):
    """A caption that writes chat tokens is judged as if it had not."""
    plain = np.asarray([[[3, 9, 12, 0, 0]]], np.int32)
    hostile = np.asarray([[[3, 57, 9, 58, 12]]], np.int32)
    one = jax.tree.map(lambda a: a[:1], world.batch.questions)
    args = world.judge, world.frozen.judge, world.frozen.instruction
    clean = judge.letter_logits(*args, plain, np.asarray([[[True] * 3 + [False] * 2]]), one)
    attacked = judge.letter_logits(*args, hostile, np.ones((1, 1, 5), bool), one)
    np.testing.assert_allclose(attacked, clean, rtol=1e-5, atol=1e-6)


def test_padding_shifts_nothing(world, captions):
    """Longer buckets of prompt and caption leave every log-probability as it is."""
    prompt = world.batch.prompt

    def wider(a, fill=0):
        return np.pad(a, [(0, 0), (0, 7)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)

    padded = prompt.replace(
        tokens=wider(prompt.tokens), mask=wider(prompt.mask), positions=wider(prompt.positions),
        feature=wider(prompt.feature, -1),
    )  # fmt: skip
    longer = captions.replace(
        tokens=jnp.pad(captions.tokens, ((0, 0), (0, 0), (0, 4)), constant_values=33),
        mask=jnp.pad(captions.mask, ((0, 0), (0, 0), (0, 4))),
    )
    plain, _ = step.caption_logps(world.policy, world.params, world.batch, captions)
    batch = world.batch.replace(prompt=padded)
    found, _ = step.caption_logps(world.policy, world.params, batch, longer)
    np.testing.assert_allclose(found[..., :9], plain, rtol=1e-5, atol=1e-6)
    assert not np.any(found[..., 9:])


def test_causal(world, captions):
    """No log-probability depends on a later token, nor on another caption of the group."""

    def embedded(x):
        decoder = {"params": world.params["decoder"]}
        trunk = world.policy.trunk(world.params, world.batch.images, world.batch.prompt)
        mask = jnp.ones(x.shape[:-1], bool)
        start = jnp.broadcast_to(trunk.next_position[:, None], x.shape[:2])
        positions = world.policy.positions(start, x.shape[2])
        return world.policy.decoder.apply(decoder, x, positions, mask, (trunk.kv,))[0][
            1, 1, 4
        ].sum()

    x = jax.random.normal(jax.random.key(0), (4, GROUP, 9, 32))
    reach = np.abs(np.asarray(jax.grad(embedded)(x))).sum(-1)
    assert np.all(reach[1, 1, :5] > 0)
    reach[1, 1, :5] = 0
    assert not np.any(reach)


def test_early_stop_leaves_the_rest_empty(world, captions):
    length, mask, tokens = (
        np.asarray(a) for a in (captions.length, captions.mask, captions.tokens)
    )
    for b, g in np.ndindex(length.shape):
        n = length[b, g]
        assert mask[b, g, :n].all() and not mask[b, g, n:].any()
        assert not tokens[b, g, n:].any() and not np.isin(tokens[b, g, : n - 1], STOP).any()
        assert np.isin(tokens[b, g, n - 1], STOP) != bool(captions.truncated[b, g])


def test_greedy_group_is_one_caption(world):
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    found = rollout.sample(
        world.policy, world.params, world.batch.images, world.batch.prompt, jax.random.key(0),
        2, STOP, greedy,
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens[:, 0], found.tokens[:, 1])
    assert not np.any(found.sample_logp)
