"""The tree is exact: it equals the computation that repeats every ancestor for every branch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.decoder import Decoder
from caprl_jax.parallel import mesh
from caprl_jax.plan.hlo import costs
from caprl_jax.rl.judge import letter_logits
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Captions, Decoding
from caprl_jax.run import compile as compile_lib

from .work_test import judge_flops

GROUP, STOP = 3, (5, 7)
SAMPLING = Sampling(max_tokens=9)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.fixture(scope="module")
def captions(world):
    decoding = Decoding(GROUP, STOP, SAMPLING)

    @jax.jit
    def draw(params, batch, key):
        return rollout(world.policy, params, batch, decoding=decoding, key=key)

    found = draw(world.params, world.batch, jax.random.key(3))
    # The cases below mean something only if captions end at different places.
    assert len(set(np.asarray(found.length).ravel())) > 2
    return jax.device_get(found)


def sequences(world, captions):
    """Each caption by itself after its own copy of image and prompt, as one plain sequence.

    Prompts lose their padding; what is left over stands at the end, where causality hides it.
    """
    prompt, rows = world.batch.prompt, []
    bucket, t = prompt.tokens.shape[1], captions.tokens.shape[2]
    for b, g in np.ndindex(captions.length.shape):
        p, n = int(prompt.mask[b].sum()), int(captions.length[b, g])
        after = np.asarray(prompt.next_position[b]) + np.arange(t)
        row = {
            "tokens": np.concatenate([prompt.tokens[b, :p], captions.tokens[b, g]]),
            "feature": np.concatenate([prompt.feature[b, :p], np.full(t, -1)]),
            "positions": np.concatenate([prompt.positions[b, :p], np.stack([after] * 3, 1)]),
        }
        left = bucket - p
        row = {k: np.pad(a, [(0, left)] + [(0, 0)] * (a.ndim - 1)) for k, a in row.items()}
        image = jax.tree.map(lambda a, b=b: a[b], world.batch.images)
        rows.append(row | {"image": image, "start": np.int32(p), "real": np.arange(t) < n})
    return jax.tree.map(lambda *a: np.stack(a), *rows)


def naive_logps(world, params, captions):
    """Log-probabilities [b, g, t] of one plain forward pass per caption: no past, all logits."""
    policy = world.policy
    decoder = {"params": params["decoder"]}
    t = captions.tokens.shape[2]

    def one(row):
        images = jax.tree.map(lambda a: a[None], row["image"])
        features = policy.vision.apply({"params": params["vision"]}, images)[0][0]
        text = policy.decoder.apply(decoder, row["tokens"], method=Decoder.embed)
        at = jnp.maximum(row["feature"], 0)
        x = jnp.where((row["feature"] >= 0)[:, None], features[at], text)
        mask = jnp.ones(x.shape[0], bool)
        hidden, _ = policy.decoder.apply(decoder, x, row["positions"], mask)
        logp = jax.nn.log_softmax(policy.decoder.apply(decoder, hidden, method=Decoder.logits))
        predicted = jnp.take_along_axis(logp[:-1], row["tokens"][1:, None], axis=1)[:, 0]
        found = jax.lax.dynamic_slice_in_dim(predicted, row["start"] - 1, t)
        return jnp.where(row["real"], found, 0)

    found = jax.vmap(one)(jax.tree.map(jnp.asarray, sequences(world, captions)))
    return found.reshape(captions.tokens.shape)


def tree_logps(world, params, captions):
    return caption_logps(world.policy, params, world.batch, captions)[0]


def test_rollout_and_update_logps_equal_naive(world, captions):
    naive = jax.jit(lambda params: naive_logps(world, params, captions))(world.params)
    updated = jax.jit(lambda params: tree_logps(world, params, captions))(world.params)
    for b, g in np.ndindex(captions.length.shape):
        n = captions.length[b, g]
        assert relative(captions.logp[b, g, :n], naive[b, g, :n]) <= 1e-5
        assert relative(updated[b, g, :n], naive[b, g, :n]) <= 1e-5


def test_gradients_of_every_parameter_equal_naive(world, captions):
    weight = np.random.default_rng(0).normal(size=captions.logp.shape).astype(np.float32)

    def gradients(logps):
        return jax.jit(jax.grad(lambda params: jnp.sum(weight * logps(world, params, captions))))

    found, expected = gradients(tree_logps)(world.params), gradients(naive_logps)(world.params)
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


def judged(world, captions, questions):
    return jax.jit(letter_logits)(world.judge, captions, questions)


def test_letter_logits_equal_naive(world, captions):
    """Instruction, caption and question as one plain sequence each, without past or holes."""
    instruction, questions = world.judge.instruction, world.batch.questions
    found, rows, ends = judged(world, captions, questions), [], []
    for b, g, n in np.ndindex(found.shape[:3]):
        caption = np.asarray(captions.tokens[b, g])[np.asarray(captions.mask[b, g])]
        caption = caption[~np.isin(caption, instruction.special)]
        question = questions.tokens[b, n][questions.mask[b, n]]
        ids = np.concatenate([instruction.tokens, caption, question])
        rows.append(np.pad(ids, (0, 30 - len(ids))))
        ends.append(len(ids) - 1)

    def plain(params, ids):
        variables = {"params": params}
        x = world.judge.decoder.apply(variables, ids, method=Decoder.embed)
        positions = jnp.broadcast_to(jnp.arange(30), ids.shape)
        hidden, _ = world.judge.decoder.apply(variables, x, positions, jnp.ones(ids.shape, bool))
        return world.judge.decoder.apply(variables, hidden, method=Decoder.logits)

    logits = jax.jit(plain)(world.judge.params, np.stack(rows))
    expected = logits[np.arange(len(ends)), ends][:, instruction.letters].reshape(found.shape)
    for got, want in zip(
        found.reshape(-1, found.shape[-1]), expected.reshape(-1, found.shape[-1]), strict=True
    ):
        assert relative(got, want) <= 1e-5


def test_an_instruction_read_before_is_not_read_again(world, captions):
    @jax.jit
    def logits(model):
        with jax.named_scope("score"):
            return letter_logits(model, captions, world.batch.questions)

    def flops(model):
        text = costs.hlo_text(logits.lower(model).compile())
        return costs.costs(costs.parse(text), ("score",))["score"].flops

    judge = world.judge
    rules = mesh.shard_rules(mesh.make_mesh({"fsdp": 1}, jax.devices()[:1]))
    read = compile_lib.read_instruction(judge.decoder, judge.params, judge.instruction, rules)
    before = judge.replace(instruction=read)
    np.testing.assert_allclose(logits(before), logits(judge), rtol=1e-5, atol=1e-6)
    s = judge.instruction.tokens.shape[0]
    own = judge_flops(judge.decoder.config, s, 0, ends=s)
    assert flops(judge) - flops(before) == own > 0
    other = read.with_tokens(judge.instruction.tokens)
    assert other.kv is None  # another prompt has not been read


def test_questions_of_their_own_equal_shared_ones(world, captions):
    """[b, g, n] questions that repeat an image's set score as the shared [b, n] set does."""
    shared = judged(world, captions, world.batch.questions)
    own = jax.tree.map(lambda a: np.repeat(a[:, None], GROUP, axis=1), world.batch.questions)
    np.testing.assert_allclose(judged(world, captions, own), shared, rtol=1e-5, atol=1e-6)


def test_special_tokens_never_reach_the_judge(world):
    """A caption that writes chat tokens is judged as if it had not."""
    plain = np.asarray([[[3, 9, 12, 0, 0]]], np.int32)
    hostile = np.asarray([[[3, 57, 9, 58, 12]]], np.int32)
    one = jax.tree.map(lambda a: a[:1], world.batch.questions)

    def logits(tokens, mask):
        return jax.jit(letter_logits)(world.judge, Captions(tokens, mask), one)

    clean = logits(plain, np.asarray([[[True] * 3 + [False] * 2]]))
    attacked = logits(hostile, np.ones((1, 1, 5), bool))
    np.testing.assert_allclose(attacked, clean, rtol=1e-5, atol=1e-6)


def test_ids_beyond_the_judges_vocabulary_count_as_absent(world):
    """A policy may have more rows than the judge; what lies outside a table would be NaN."""
    plain = np.asarray([[[3, 9, 12, 0, 0]]], np.int32)
    beyond = np.asarray([[[3, 60, 9, 7000, 12]]], np.int32)
    one = jax.tree.map(lambda a: a[:1], world.batch.questions)
    logits = jax.jit(lambda t, m: letter_logits(world.judge, Captions(t, m), one))
    clean = logits(plain, np.asarray([[[True] * 3 + [False] * 2]]))
    np.testing.assert_allclose(
        logits(beyond, np.ones((1, 1, 5), bool)), clean, rtol=1e-5, atol=1e-6
    )


def test_padding_shifts_nothing(world, captions):
    """Longer buckets of prompt and caption leave every log-probability as it is."""
    prompt = world.batch.prompt

    def wider(a, fill=0):
        return np.pad(a, [(0, 0), (0, 7)] + [(0, 0)] * (a.ndim - 2), constant_values=fill)

    padded = prompt.replace(
        tokens=wider(prompt.tokens),
        mask=wider(prompt.mask),
        positions=wider(prompt.positions),
        feature=wider(prompt.feature, -1),
    )
    longer = captions.replace(
        tokens=jnp.pad(captions.tokens, ((0, 0), (0, 0), (0, 4)), constant_values=33),
        mask=jnp.pad(captions.mask, ((0, 0), (0, 0), (0, 4))),
    )
    logps = jax.jit(lambda batch, c: caption_logps(world.policy, world.params, batch, c)[0])
    plain = logps(world.batch, captions)
    found = logps(world.batch.replace(prompt=padded), longer)
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
    reach = np.abs(np.asarray(jax.jit(jax.grad(embedded))(x))).sum(-1)
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
    decoding, key = Decoding(2, STOP, greedy), jax.random.key(0)
    found = jax.jit(
        lambda params, batch: rollout(world.policy, params, batch, decoding=decoding, key=key)
    )(world.params, world.batch)
    np.testing.assert_array_equal(found.tokens[:, 0], found.tokens[:, 1])
    assert not np.any(found.sample_logp)
