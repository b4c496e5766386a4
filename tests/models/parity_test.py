"""The ladder against transformers, float32: tower, decoder, logits, positions, greedy captions."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from caprl_jax import rollout
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vision import feature_order

from .conftest import GRIDS, STOP, make_inputs

BOUND = 1e-4


def largest(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


def test_decoder_logits_equal_transformers(text_pair):
    ids = np.random.default_rng(0).integers(0, 300, (2, 500))
    variables = {"params": text_pair.params["decoder"]}
    decoder = text_pair.ours.decoder

    def logits(ids):
        x = decoder.apply(variables, ids, method=Decoder.embed)
        positions = jnp.broadcast_to(jnp.arange(500), ids.shape)
        hidden, _ = decoder.apply(variables, x, positions, jnp.ones(ids.shape, bool))
        return decoder.apply(variables, hidden, method=Decoder.logits)

    with torch.no_grad():
        expected = text_pair.theirs(torch.tensor(ids)).logits.numpy()
    assert np.std(expected) > 0.5
    assert largest(jax.jit(logits)(ids), expected) <= BOUND


def test_vision_tower_equals_transformers_on_unequal_images(vision_pair, inputs):
    tower, params = vision_pair.ours.vision, vision_pair.params["vision"]
    ours = jax.jit(lambda i: tower.apply({"params": params}, i))(inputs.images)
    grid = inputs.torch["image_grid_thw"]
    with torch.no_grad():
        theirs = vision_pair.theirs.model.visual(inputs.torch["pixel_values"], grid_thw=grid)
    theirs = theirs.pooler_output.numpy()
    ends = np.cumsum([a * b // 4 for a, b in GRIDS])
    assert ends[-1] == len(theirs)
    for features, expected, shape in zip(ours, np.split(theirs, ends[:-1]), GRIDS, strict=True):
        assert largest(features[feature_order(shape, tower.config)], expected) <= BOUND


def test_tower_reaches_exactly_its_window(vision_pair, inputs):
    """With windowed layers only, a patch moves its own window's features and no others."""
    tower = vision_pair.ours.vision
    windowed = tower.clone(config=tower.config.__class__(**{
        **tower.config.__dict__, "full_layers": ()
    }))  # fmt: skip
    patches = tower.config.window**2

    def feature(x):
        images = inputs.images.replace(patches=x)
        # One channel of the first feature of image 1's second window.
        return windowed.apply({"params": vision_pair.params["vision"]}, images)[1, patches // 4, 0]

    reach = np.abs(np.asarray(jax.jit(jax.grad(feature))(inputs.images.patches))).sum(-1)
    seen = np.zeros_like(reach, bool)
    seen[1, patches : 2 * patches] = inputs.images.mask[1, patches : 2 * patches]
    np.testing.assert_array_equal(reach > 0, seen)


def test_positions_equal_get_rope_index(vision_pair, inputs):
    arguments = {k: v for k, v in inputs.torch.items() if k != "pixel_values"}
    positions, deltas = vision_pair.theirs.model.get_rope_index(**arguments)
    theirs = np.moveaxis(positions.numpy(), 0, -1)
    mask = inputs.prompt.mask
    np.testing.assert_array_equal(inputs.prompt.positions[mask], theirs[mask])
    # A caption's first token comes at its offset in the unpadded sequence plus transformers' delta.
    np.testing.assert_array_equal(inputs.prompt.next_position, mask.sum(1) + deltas.numpy()[:, 0])


def test_policy_logits_equal_transformers(vision_pair, inputs):
    policy = vision_pair.ours

    def logits(params):
        trunk = policy.trunk(params, inputs.images, inputs.prompt)
        return policy.logits(params, trunk.hidden)

    with torch.no_grad():
        expected = vision_pair.theirs(**inputs.torch).logits.numpy()
    mask = inputs.prompt.mask
    assert np.std(expected[mask]) > 0.5
    assert largest(jax.jit(logits)(vision_pair.params)[mask], expected[mask]) <= BOUND


def test_greedy_captions_equal_generate(vision_pair):
    """Decoding against the tree gives transformers' tokens, one image at a time."""
    policy, length = vision_pair.ours, 24
    inputs = make_inputs(policy.vision.config, 40, 100)
    greedy = rollout.Sampling(max_tokens=length, temperature=0.0)
    ours = jax.jit(lambda params: rollout.sample(
        policy, params, inputs.images, inputs.prompt, jax.random.key(0), 2, (STOP,), greedy
    ))(vision_pair.params)  # fmt: skip
    ends = np.cumsum([a * b for a, b in GRIDS])[:-1]
    for i, patches in enumerate(np.split(inputs.torch["pixel_values"].numpy(), ends)):
        real = inputs.prompt.mask[i]
        one = {k: v[i : i + 1][:, torch.tensor(real)] for k, v in inputs.torch.items()
               if k in ("input_ids", "attention_mask", "mm_token_type_ids")}  # fmt: skip
        found = vision_pair.theirs.generate(
            **one,
            pixel_values=torch.tensor(patches),
            image_grid_thw=inputs.torch["image_grid_thw"][i : i + 1],
            do_sample=False, max_new_tokens=length, eos_token_id=STOP, pad_token_id=0,
        )[0, real.sum() :].numpy()  # fmt: skip
        expected = np.zeros(length, np.int32)
        expected[: len(found)] = found
        for caption in ours.tokens[i]:
            np.testing.assert_array_equal(caption, expected)
