"""In bfloat16 what must not lose digits is computed in float32: norms, angles, softmax, losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.attention import attend, own, text
from caprl_jax.rl import update
from caprl_jax.rl.judge import letter_logits
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Captions, Decoding, Rollout

from .runs import make_run

# exp: softmax and ratios; rsqrt: norms; cos, sin: RoPE; log: log-probabilities and entropies.
EXACT = ("exp", "rsqrt", "cos", "sin", "log", "log1p", "exp2")


def equations(jaxpr):
    """All equations of a jaxpr, those of its inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def computed_in(function, *args) -> dict[str, set]:
    """primitive -> the dtypes it reads."""
    found: dict[str, set] = {}
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        dtypes = {v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")}
        found.setdefault(equation.primitive.name, set()).update(dtypes)
    return found


@pytest.fixture(scope="module", params=[jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def half(world, request):
    """The world computing in bfloat16, on parameters of either dtype."""
    policy = dataclasses.replace(
        world.policy,
        decoder=world.policy.decoder.clone(dtype=jnp.bfloat16),
        vision=world.policy.vision.clone(dtype=jnp.bfloat16),
    )
    cast = jax.tree.map(lambda a: a.astype(request.param), (world.params, world.judge.params))
    decoder = world.judge.decoder.clone(dtype=jnp.bfloat16)
    judge = world.judge.replace(decoder=decoder, params=cast[1])
    return dataclasses.replace(world, policy=policy, params=cast[0], judge=judge)


def captions(world):
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, 50, (4, 3, 6))
    mask = np.arange(6) < rng.integers(2, 7, (4, 3, 1))
    return tokens, mask


def losses(world):
    tokens, mask = captions(world)
    length = jnp.sum(mask, -1)
    zeros = jnp.zeros(tokens.shape)
    captions_ = Rollout(tokens, mask, zeros, zeros, length, length > 9)
    example = update._Example(
        world.batch, captions_, jnp.ones((4, 3)), jnp.ones((4, 3), bool), zeros
    )
    learner = make_run(world, kl=0.1).learner
    return lambda params: update._slice_loss(learner, params, example, None)[0]


def test_the_gradient_of_attention_has_its_softmax_in_float32():
    q, k, v = (jnp.ones((2, 5, heads, 4), jnp.bfloat16) for heads in (4, 2, 2))
    row = text(jnp.ones((2, 5), bool))

    def loss(*qkv):
        return jnp.sum(attend(qkv[0], [own(*qkv[1:], row)]).astype(jnp.float32))

    found = computed_in(jax.grad(loss, (0, 1, 2)), q, k, v)
    assert found["exp"] == found["log"] == {jnp.dtype("float32")}


def assert_exact(found, names=EXACT):
    for name in names:
        assert found.get(name, {jnp.dtype("float32")}) == {jnp.dtype("float32")}, name
    assert {"exp", "rsqrt", "cos", "log"} <= found.keys()


def test_update_and_its_gradient(half):
    loss = losses(half)
    assert_exact(computed_in(loss, half.params))
    found = computed_in(jax.value_and_grad(loss), half.params)
    # The derivative of the merger's GELU is an exp too, and like all activations in bfloat16.
    assert_exact(found, set(EXACT) - {"exp"})
    assert jnp.dtype("bfloat16") in found["dot_general"]  # and the products are not float32
    value, grads = jax.eval_shape(jax.value_and_grad(loss), half.params)
    assert value.dtype == jnp.float32
    assert jax.tree.all(jax.tree.map(lambda g, p: g.dtype == p.dtype, grads, half.params))


def test_rollout(half):
    def draw(params, key):
        decoding = Decoding(2, (5,), Sampling(max_tokens=4))
        return rollout(half.policy, params, half.batch, decoding=decoding, key=key)

    found = computed_in(draw, half.params, jax.random.key(0))
    assert found["exp"] == found["cos"] == found["rsqrt"] == {jnp.dtype("float32")}
    assert jax.eval_shape(draw, half.params, jax.random.key(0)).logp.dtype == jnp.float32


def test_judge(half):
    tokens, mask = captions(half)

    def logits(model):
        return letter_logits(model, Captions(tokens, mask), half.batch.questions)

    found = computed_in(logits, half.judge)
    assert found["exp"] == found["cos"] == found["rsqrt"] == {jnp.dtype("float32")}
    assert jax.eval_shape(logits, half.judge).dtype == jnp.float32


def test_half_precision_is_near_full(world, half):
    exact, rough = (jax.jit(losses(w))(w.params) for w in (world, half))
    assert abs(exact - rough) < 0.03 * abs(exact)
