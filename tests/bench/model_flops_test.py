"""MFU's FLOPs against a count by hand, and against what programs compute beyond it."""

import jax
import pytest

from caprl_jax.bench import model_flops, phases, synthetic
from caprl_jax.plan import flops, roofline, shapes

from .. import shipped


def tiny(**changed):
    """(config, its step) on one device, all of its shapes small."""
    config = shipped.module("tiny").get_config()
    config.update_from_flattened_dict(
        {
            "data.batch": 2,
            "caprl.group": 2,
            "sampling.max_tokens": 8,
            "caprl.updates": 1,
            "caprl.kl": 0.0,
            "policy.freeze_vision": True,
        }
        | changed
    )
    return config, shapes.build(config, jax.devices()[:1])


def by_hand(config, built):
    """(prompts, captions, head, what attention multiplies queries with keys) of a forward pass."""
    c = built.policy.decoder.config
    b, p = config.data.batch, config.data.max_prompt
    captions, t = b * config.caprl.group, config.sampling.max_tokens
    heads = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    weights = c.layers * (heads + 3 * c.width * c.feed_forward)
    pairs = b * p * p, captions * t * (p + t)
    scores = [2 * c.layers * c.heads * c.head_dim * n for n in pairs]
    head = 2 * captions * t * c.width * c.vocab
    return (
        2 * b * p * weights + 2 * scores[0],
        2 * captions * t * weights + 2 * scores[1],
        head,
        scores,
    )


def computed_again(config, built):
    """FLOPs of the traced update beyond what it needs."""
    branches = roofline.branch_weights(built.policy.vision.config)
    [whole] = (
        flops.jaxpr_flops(jax.make_jaxpr(phase.function)(*phase.args), 0, branches)
        for phase in phases.phases(config, built, synthetic.caption_lengths(config, None))
        if phase.name == "update"
    )
    return whole - model_flops.update(config, built)


def test_a_forward_pass_is_what_weights_and_attention_multiply():
    config, built = tiny()
    prompts, captions, head, _ = by_hand(config, built)
    found = model_flops.forward(config, built)
    assert (found.prompts, found.captions) == (prompts, captions + head)
    assert found.images > 0


@pytest.mark.parametrize(
    ("key", "value", "images", "prompts", "captions"),
    [
        ("policy.freeze_vision", True, 1, 3, 3),
        ("policy.freeze_vision", False, 3, 3, 3),
        ("caprl.updates", 2, 2, 6, 6),
        ("caprl.kl", 0.1, 2, 4, 4),
    ],
)
def test_a_gradient_needs_twice_its_forward_pass(key, value, images, prompts, captions):
    """And the forward pass itself; a frozen tower has none."""
    config, built = tiny(**{key: value})
    once = model_flops.forward(config, built)
    expected = images * once.images + prompts * once.prompts + captions * once.captions
    assert model_flops.update(config, built) == expected


def test_attention_alone_is_computed_again_where_all_is_kept():
    config, built = tiny(**{"policy.remat": "none"})
    assert computed_again(config, built) == sum(by_hand(config, built)[-1])


def test_the_decoder_is_computed_again_where_nothing_is_kept():
    """But its last product. Queries meet keys twice: in the layer, and in attention's gradient."""
    config, built = tiny(**{"policy.remat": "full"})
    prompts, captions, _, scores = by_hand(config, built)
    c = built.policy.decoder.config
    tokens = 2 * config.data.max_prompt + 2 * config.caprl.group * config.sampling.max_tokens
    last = 2 * tokens * c.layers * c.feed_forward * c.width
    assert computed_again(config, built) == prompts + captions + sum(scores) - last
