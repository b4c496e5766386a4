"""Parity with transformers in float32: blocks, tower, logits, positions, greedy captions.

`bash launch/test.sh tests/models` prints the table of differences at its end.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from caprl_jax.decode.sampling import Sampling
from caprl_jax.models import attention, rope
from caprl_jax.models.block import Block, Context
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vision import VisionBlock, feature_order
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Decoding

from .conftest import GRIDS, STOP, make_inputs

BOUND = 1e-4


def layers_seen(layers, run):
    """Records [(input, output)] of each of transformers' layers during run()."""
    seen = []

    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        seen.append((x.detach().clone().numpy(), out.detach().clone().numpy()))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    assert len(seen) == len(layers)
    return seen


def layer_params(stacked, i):
    return {"params": jax.tree.map(lambda a: a[i], stacked)}


def test_decoder_blocks_and_logits_equal_transformers(text_pair, within):
    ids = np.random.default_rng(0).integers(0, 300, (2, 500))
    variables = {"params": text_pair.params["decoder"]}
    decoder, theirs = text_pair.ours.decoder, text_pair.theirs
    mask, positions = np.ones(ids.shape, bool), np.broadcast_to(np.arange(500), ids.shape)
    rotation = decoder.apply(variables, positions, mask, method=Decoder.rotation)
    context = Context(rotation, attention.text(jnp.asarray(mask)))
    block = jax.jit(lambda p, x: Block(decoder.config).apply(p, x, context, (), 0)[0])
    for i, (x, y) in enumerate(layers_seen(theirs.model.layers, lambda: theirs(torch.tensor(ids)))):
        ours = block(layer_params(variables["params"]["layers"], i), x)
        within(ours, y, BOUND, f"decoder block {i}")

    def logits(ids):
        x = decoder.apply(variables, ids, method=Decoder.embed)
        hidden, _ = decoder.apply(variables, x, jnp.asarray(positions), jnp.asarray(mask))
        return decoder.apply(variables, hidden, method=Decoder.logits)

    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert np.std(expected) > 0.5
    within(jax.jit(logits)(ids), expected, BOUND, "logits, 500 tokens")


def test_vision_blocks_equal_transformers(vision_pair, inputs, within):
    tower, params = vision_pair.ours.vision, vision_pair.params["vision"]
    c, visual = tower.config, vision_pair.theirs.model.visual
    pixels, grid = (inputs.torch[k] for k in ("pixel_values", "image_grid_thw"))
    seen = layers_seen(visual.blocks, lambda: visual(pixels, grid_thw=grid))
    mask = inputs.images.mask
    angles = rope.angles(inputs.images.positions, 1e4, c.width // c.heads // 2)
    rotation = rope.rotation(angles.reshape(*mask.shape, -1))
    run = jax.jit(lambda p, x, full: VisionBlock(c).apply(p, x, rotation, mask, full))
    for i, (x, y) in enumerate(seen):
        padded = np.zeros((*mask.shape, c.width), np.float32)
        padded[mask] = x
        ours = run(layer_params(params["blocks"], i), padded, i in c.full_layers)
        within(ours[mask], y, BOUND, f"vision block {i}")


def test_vision_tower_equals_transformers_on_unequal_images(vision_pair, inputs, within):
    tower, params = vision_pair.ours.vision, vision_pair.params["vision"]
    features, deep = jax.jit(lambda i: tower.apply({"params": params}, i))(inputs.images)
    grid = inputs.torch["image_grid_thw"]
    with torch.no_grad():
        theirs = vision_pair.theirs.model.visual(inputs.torch["pixel_values"], grid_thw=grid)
    expected = {"features": (features, theirs.pooler_output)}
    for i, their_deep in enumerate(getattr(theirs, "deepstack_features", None) or ()):
        expected[f"DeepStack features {i}"] = (deep[i], their_deep)
    assert len(expected) == 1 + len(tower.config.deep_layers)
    ends = np.cumsum([a * b // 4 for a, b in GRIDS])
    for name, (ours, their_features) in expected.items():
        assert ends[-1] == len(their_features)
        images = np.split(their_features.numpy(), ends[:-1])
        for own, image, grid in zip(ours, images, GRIDS, strict=True):
            within(own[feature_order(grid, tower.config)], image, BOUND, f"tower's {name}")


def test_windowed_tower_depends_on_exactly_its_window(vision_pair, inputs):
    """With windowed layers only, a patch changes the features of its own window and no others."""
    tower = vision_pair.ours.vision
    if tower.config.window == tower.config.merge:
        pytest.skip("this family attends over the whole image in every layer: no windows to test")
    windowed = tower.clone(config=dataclasses.replace(tower.config, full_layers=()))
    patches = tower.config.window**2

    def feature(x):
        images = inputs.images.replace(patches=x)
        # One channel of the first feature in the second window of image 1.
        features, _ = windowed.apply({"params": vision_pair.params["vision"]}, images)
        return features[1, patches // 4, 0]

    gradient = np.abs(np.asarray(jax.jit(jax.grad(feature))(inputs.images.patches))).sum(-1)
    window = np.zeros_like(gradient, bool)
    window[1, patches : 2 * patches] = inputs.images.mask[1, patches : 2 * patches]
    np.testing.assert_array_equal(gradient > 0, window)


def test_positions_equal_get_rope_index(vision_pair, inputs, within):
    arguments = {k: v for k, v in inputs.torch.items() if k != "pixel_values"}
    positions, deltas = vision_pair.theirs.model.get_rope_index(**arguments)
    theirs = np.moveaxis(positions.numpy(), 0, -1)
    mask = inputs.prompt.mask
    within(inputs.prompt.positions[mask], theirs[mask], 0, "3-D positions")
    # transformers puts a caption's first token at its unpadded offset plus a delta.
    expected = mask.sum(1) + deltas.numpy()[:, 0]
    within(inputs.prompt.next_position, expected, 0, "position of the caption")


def test_policy_logits_equal_transformers(vision_pair, inputs, within):
    policy = vision_pair.ours

    def logits(params):
        trunk = policy.trunk(params, inputs.images, inputs.prompt)
        return policy.logits(params, trunk.hidden)

    with torch.no_grad():
        expected = vision_pair.theirs(**inputs.torch).logits.numpy()
    mask = inputs.prompt.mask
    assert np.std(expected[mask]) > 0.5
    ours = jax.jit(logits)(vision_pair.params)
    within(ours[mask], expected[mask], BOUND, "logits, 4 images, 500 tokens")


def test_greedy_captions_equal_generate(vision_pair, within):
    """Decoding over the tree gives the tokens that transformers gives for single images."""
    policy, length = vision_pair.ours, 24
    inputs = make_inputs(policy.vision.config, 40, 100)
    greedy = Sampling(max_tokens=length, temperature=0.0)
    batch = Batch(inputs.images, inputs.prompt, None, np.ones(len(GRIDS), bool))
    decoding, key = Decoding(2, (STOP,), greedy), jax.random.key(0)
    ours = jax.jit(lambda params: rollout(policy, params, batch, decoding=decoding, key=key))(
        vision_pair.params
    )
    ends = np.cumsum([a * b for a, b in GRIDS])[:-1]
    for i, patches in enumerate(np.split(inputs.torch["pixel_values"].numpy(), ends)):
        real = inputs.prompt.mask[i]
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        prompt = {k: inputs.torch[k][i : i + 1][:, torch.tensor(real)] for k in names}
        written = vision_pair.theirs.generate(
            **prompt,
            pixel_values=torch.tensor(patches),
            image_grid_thw=inputs.torch["image_grid_thw"][i : i + 1],
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=STOP,
            pad_token_id=0,
        )
        tokens = written[0, real.sum() :].numpy()
        expected = np.zeros(length, np.int32)
        expected[: len(tokens)] = tokens
        for caption in ours.tokens[i]:
            within(caption, expected, 0, "greedy tokens against generate()")
