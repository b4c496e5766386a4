"""Supervised training: its loss, and what one update changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from caprl_jax.data import pipeline
from caprl_jax.data.tokens import pad
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.vlm import Policy, Prompt
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import bind
from caprl_jax.rl import sft
from caprl_jax.rl.types import State

from ..conftest import make_world
from .runs import assert_close

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy, its parameters, and trees to learn from."""

    policy: Policy
    params: dict
    examples: sft.Examples


def ragged(rng, rows, columns, least=1):
    """Random lengths' mask."""
    return np.arange(columns) < rng.integers(least, columns + 1, (*rows, 1))


@functools.cache
def make_case(kind, g=2, t=5, s=4):
    """Random trees for a model with images or of text alone; a third of the weights are 0."""
    b = {"images": 8, "text": 3}[kind]
    rng = np.random.default_rng(b)
    if kind == "images":
        world = make_world(b)
        policy, params = world.policy, world.params
        images, prompt = world.batch.images, world.batch.prompt
    else:
        policy = Policy(Decoder(DecoderConfig(60, 32, 2, 4, 2, 8, 48, 1e4, 1e-6, False)))
        params = nn.meta.unbox(jax.jit(policy.init)(jax.random.key(1)))
        params = jax.tree.map(lambda a: a * 1.5 if a.ndim > 2 else a, params)
        images, mask = None, ragged(rng, (b,), 7, 2)
        positions = np.broadcast_to(np.arange(7, dtype=np.int32), (b, 7))
        prompt = Prompt(
            rng.integers(0, 50, (b, 7)).astype(np.int32),
            mask,
            positions,
            np.full((b, 7), -1, np.int32),
            mask.sum(1).astype(np.int32),
        )

    def weights(mask):
        drawn = rng.uniform(0.5, 2, mask.shape) * (rng.random(mask.shape) > 1 / 3)
        return np.where(mask, drawn, 0).astype(np.float32)

    # A sharper head, so that some targets are likelier than all others together and some are not.
    decoder = dict(params["decoder"])
    decoder["head"] = decoder["head"] * 5
    mask = ragged(rng, (b, g), t)
    return Case(
        policy,
        dict(params) | {"decoder": decoder},
        sft.Examples(
            prefix=rng.integers(0, 50, s).astype(np.int32),
            images=images,
            prompt=prompt,
            prompt_targets=rng.integers(0, 50, prompt.tokens.shape).astype(np.int32),
            prompt_weight=weights(prompt.mask),
            tokens=rng.integers(0, 50, (b, g, t)).astype(np.int32),
            mask=mask,
            weight=weights(mask),
        ),
    )


@pytest.fixture(scope="module", params=["text", "images"])
def case(request):
    """Trees of both kinds of models."""
    return make_case(request.param)


@functools.partial(jax.jit, static_argnums=0)
def compiled_losses(policy, params, examples):
    """sft.losses."""
    return sft.losses(policy, params, examples)


def losses(case, **changes):
    """sft.losses of the case's examples, with some of their fields changed."""
    examples = case.examples.replace(**changes)
    return jax.device_get(compiled_losses(case.policy, case.params, examples))


LONGEST = 32  # of one text, in tokens


@functools.partial(jax.jit, static_argnums=0)
def compiled_logits(policy, params, images, prompt):
    """The logits after each token of one text that is all trunk."""
    return policy.logits(params, policy.trunk(params, images, prompt).hidden[0])


def joined(case, row, after):
    """(prefix, trunk and the tokens after it of one row, as a Prompt [1, ..]; trunk's end)."""
    examples, real = case.examples, case.examples.prompt.mask[row]
    own = jax.tree.map(np.asarray, examples.prompt)
    s, n = len(examples.prefix), len(after)
    following = int(own.next_position[row])

    def text_positions(start, count):
        flat = np.arange(start, start + count, dtype=np.int32)
        return flat if own.positions.ndim == 2 else np.repeat(flat[:, None], 3, 1)

    parts = {
        "tokens": (examples.prefix, own.tokens[row][real], after),
        "positions": (
            text_positions(0, s),
            own.positions[row][real] + s,
            text_positions(following + s, n),
        ),
        "feature": (np.full(s, -1), own.feature[row][real], np.full(n, -1)),
    }
    end = s + int(real.sum())
    arrays = {k: pad(np.concatenate(v), LONGEST)[None] for k, v in parts.items()}
    mask = np.arange(LONGEST)[None] < end + n
    return Prompt(mask=mask, next_position=np.int32([following + s + n]), **arrays), end


def log_softmax(case, row, after):
    """(float64 [LONGEST, vocab] log-probabilities after each token, trunk's end) of one text."""
    prompt, end = joined(case, row, after)
    images = jax.tree.map(lambda a: a[row : row + 1], case.examples.images)
    logits = np.asarray(compiled_logits(case.policy, case.params, images, prompt), np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True), end


def naive(case):
    """(sum of weighted losses, total weight, weight of likeliest targets), one text at a time."""
    e, s = case.examples, len(case.examples.prefix)
    terms = []
    for row in range(len(e.tokens)):
        logp, end = log_softmax(case, row, [])
        real = np.flatnonzero(e.prompt.mask[row])
        for at, token in enumerate(real):
            target = e.prompt_targets[row, token]
            terms.append((e.prompt_weight[row, token], logp[s + at, target]))
        for branch, mask, weight in zip(e.tokens[row], e.mask[row], e.weight[row]):
            own = branch[mask]
            logp, _ = log_softmax(case, row, own)
            for i, target in enumerate(own):
                terms.append((weight[i], logp[end - 1 + i, target]))
    weights, logps = np.asarray(terms).T
    # Half is a bound that matters: some likely targets are on either side of it.
    assert set(logps[(weights > 0) & (logps > np.log(0.1))] > np.log(0.5)) == {True, False}
    return -np.sum(weights * logps), np.sum(weights), np.sum(weights * (logps > np.log(0.5)))


def test_the_loss_is_that_of_every_text_by_itself(case):
    """Prefix, trunk and branch in one row, one row at a time, by plain log_softmax."""
    logp, end = log_softmax(case, 0, [])
    likely = logp[len(case.examples.prefix) : end].argmax(-1)
    real = np.asarray(case.examples.prompt.mask[0])
    targets = np.array(case.examples.prompt_targets)
    targets[0, real] = likely  # so that accuracy has something to count
    case = dataclasses.replace(case, examples=case.examples.replace(prompt_targets=targets))
    total, metrics = losses(case)
    expected, weight, right = naive(case)
    assert total == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] == (total, pytest.approx(weight, rel=1e-6))
    assert 0 < right < weight
    assert metrics["accuracy"] == (pytest.approx(right, rel=1e-5), metrics["loss"][1])
    assert sft.total_weight(case.examples) == pytest.approx(weight, rel=1e-6)


def test_the_loss_is_in_proportion_to_the_weights(case):
    """Doubled weights double it; without weights there is none."""
    e, total = case.examples, losses(case)[0]
    twice = losses(case, weight=2 * e.weight, prompt_weight=2 * e.prompt_weight)[0]
    assert twice == pytest.approx(2 * total, rel=1e-6)
    zero = losses(case, weight=0 * e.weight, prompt_weight=0 * e.prompt_weight)
    assert zero[0] == 0 and zero[1]["loss"] == (0, 0)


def test_what_has_no_weight_does_not_count(case):
    """Trunk targets without weight may be any, and so may a last token of a branch."""
    e = case.examples
    last = e.mask & ~np.pad(e.mask[..., 1:], [(0, 0), (0, 0), (0, 1)])
    weight = np.where(last, 0, e.weight)
    targets = np.where(e.prompt_weight > 0, e.prompt_targets, 3)
    tokens = np.where(last, 3, e.tokens)
    assert np.any(targets != e.prompt_targets) and np.any(tokens != e.tokens)
    found = losses(case, weight=weight, prompt_targets=targets, tokens=tokens)[0]
    assert found == pytest.approx(losses(case, weight=weight)[0], rel=1e-6)
    with_weight = losses(case, tokens=tokens)[0]  # which it does with one
    assert with_weight != pytest.approx(losses(case)[0], rel=1e-4)


def test_padding_does_not_count(case):
    """Neither what stands in it nor how much there is of it."""
    e, p = case.examples, case.examples.prompt
    filled = p.replace(tokens=np.where(p.mask, p.tokens, 11))
    tokens = np.where(e.mask, e.tokens, 11)
    assert np.any(tokens != e.tokens) and np.any(filled.tokens != p.tokens)
    total, metrics = losses(case)
    found, other = losses(case, prompt=filled, tokens=tokens)
    assert found == pytest.approx(total, rel=1e-6) and other["loss"][1] == metrics["loss"][1]
    longer = {
        name: np.pad(getattr(e, name), [(0, 0), (0, 0), (0, 3)])
        for name in ("tokens", "mask", "weight")
    }
    found, other = losses(case, **longer)
    assert found == pytest.approx(total, rel=1e-6)
    assert other["loss"][1] == pytest.approx(metrics["loss"][1], rel=1e-6)


def test_a_shared_prefix_is_the_prefix_in_every_trunk(case):
    """Read once for the batch, it teaches as if each trunk began with it."""
    e, b, s = case.examples, len(case.examples.tokens), len(case.examples.prefix)

    def before(first, rest):
        return np.concatenate([np.broadcast_to(first, (b, s, *rest.shape[2:])), rest], axis=1)

    start = np.arange(s, dtype=np.int32).reshape(s, *[1] * (e.prompt.positions.ndim - 2))
    prompt = Prompt(
        tokens=before(e.prefix, e.prompt.tokens),
        mask=before(np.True_, e.prompt.mask),
        positions=before(start, e.prompt.positions + s),
        feature=before(np.int32(-1), e.prompt.feature),
        next_position=e.prompt.next_position + s,
    )
    total, metrics = losses(case)
    found, other = losses(
        case,
        prefix=np.zeros(0, np.int32),
        prompt=prompt,
        prompt_targets=before(np.int32(0), e.prompt_targets),
        prompt_weight=before(np.float32(0), e.prompt_weight),
    )
    assert found == pytest.approx(total, rel=1e-5) and other["loss"][1] == metrics["loss"][1]
    without = losses(case, prefix=np.zeros(0, np.int32))[0]
    assert without != pytest.approx(total, rel=1e-4)  # and the prefix is read


# What an update changes


def one_update(policy, state, examples):
    """sft.sft_step."""
    return sft.sft_step(policy, OPTIMIZER, state, examples)


compiled_update = jax.jit(one_update, static_argnums=0)


def updated(case, examples, steps=1, on=None):
    """(state, metrics of every step) after some updates on the same examples."""
    state = State(jnp.zeros((), jnp.int32), case.params, OPTIMIZER.init(case.params))
    if on is not None:
        boxed = jax.eval_shape(case.policy.init, jax.random.key(0))
        shardings = mesh.param_shardings(boxed, on)
        state = state.replace(params=jax.device_put(state.params, shardings))
        placed = mesh.put_batch(examples.replace(prefix=()), on)
        prefix = jax.device_put(examples.prefix, mesh.replicated(on))
        examples = placed.replace(prefix=prefix)
    run = functools.partial(compiled_update, case.policy)
    if on is not None:
        run = jax.jit(bind(functools.partial(one_update, case.policy), on))
    metrics = []
    for _ in range(steps):
        state, measured = run(state, examples)
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics


def moved(case, state):
    """The distance that each parameter went."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, case.params)


@pytest.fixture(scope="module")
def pictured():
    """Trees with images, 8 of them."""
    return make_case("images")


@pytest.fixture(scope="module")
def alone(pictured):
    """(state, metrics) of one update on one device."""
    state, (metrics,) = updated(pictured, pictured.examples)
    return state, metrics


def test_an_update_moves_all_parameters_along_the_mean_loss(pictured, alone):
    """It is one clipped step of SGD on the loss over the total weight."""
    state, metrics = alone
    e, params = pictured.examples, pictured.params
    assert state.step == 1
    assert all(np.any(d) for d in jax.tree.leaves(moved(pictured, state)))

    def mean_loss(params):
        return sft.losses(pictured.policy, params, e)[0] / sft.total_weight(e)

    grads = jax.device_get(jax.jit(jax.grad(mean_loss))(params))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    assert metrics["grad_norm"] == (pytest.approx(norm, rel=1e-4), 1)
    assert metrics["loss"][0] == pytest.approx(losses(pictured)[0], rel=1e-5)
    scale = -0.5 * min(1, 1 / norm)
    assert_close(moved(pictured, state), jax.tree.map(lambda g: scale * g, grads))


def test_a_few_updates_lower_the_loss_on_their_batch(case):
    optimised = [m["loss"][0] / m["loss"][1] for m in updated(case, case.examples, 6)[1]]
    assert optimised[-1] < 0.9 * optimised[0]


def test_rows_without_weight_change_nothing(pictured):
    """With blank rows an update is that of the others; with rows of other text too."""
    cut, prefix = (lambda a: a[:5]), pictured.examples.prefix
    five = jax.tree.map(cut, pictured.examples.replace(prefix=()))
    valid = np.arange(8) < 5

    def keep(a, b):
        return np.where(valid.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    whole = pictured.examples
    other = jax.tree.map(lambda a: a[::-1], whole.replace(prefix=())).replace(
        prompt_weight=np.zeros_like(whole.prompt_weight), weight=np.zeros_like(whole.weight)
    )
    blank = pipeline.blank(whole)
    expected, (metrics,) = updated(pictured, five.replace(prefix=prefix))
    for filler in (blank, other):
        filled = jax.tree.map(keep, whole.replace(prefix=()), filler.replace(prefix=()))
        found, (measured,) = updated(pictured, filled.replace(prefix=prefix))
        assert_close(moved(pictured, found), moved(pictured, expected))
        for name in ("loss", "grad_norm"):  # the latter before its clipping
            np.testing.assert_allclose(measured[name], metrics[name], rtol=1e-5, err_msg=name)
    found, (measured,) = updated(pictured, blank)
    assert not any(np.any(d) for d in jax.tree.leaves(moved(pictured, found)))
    assert measured["loss"] == (0, 0) and found.step == 1


def test_an_update_on_eight_devices_is_that_on_one(pictured, alone):
    """Rows, parameters and layers' channels cut in two each."""
    on = mesh.shard_rules(mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    state, (metrics,) = updated(pictured, pictured.examples, on=on)
    assert_close(moved(pictured, state), moved(pictured, alone[0]))
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], alone[1][name], rtol=1e-4, err_msg=name)
