"""Places of tokens say who sees whom in packed rows."""

import jax.numpy as jnp
import numpy as np

from caprl_jax.models import places


def _places(group, leaf, order):
    return places.Places(*(jnp.array([row], jnp.int32) for row in (group, leaf, order)))


def test_captions_of_a_row_see_themselves_and_what_came_before_in_them():
    row = _places([0, 0, 1, 1, -1], [0] * 5, [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(
        places.visible(row, row)[0],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]],
    )


def test_questions_see_their_caption_and_themselves():
    row = _places([0, 0, 0, 0], [0, 1, 1, 2], [0, 1, 2, 1])
    np.testing.assert_array_equal(
        places.visible(row, row)[0], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    )


def test_padding_sees_nothing():
    row = _places([0, places.PAD_QUERY], [0, 0], [0, 0])
    assert not places.visible(row, row)[0, 1].any()
    row = _places([0, places.PAD_KEY], [0, 0], [0, 0])
    assert not places.visible(row, row)[0, 1].any()


def test_causal_and_shared_places():
    mask = jnp.array([[True, True, False], [True, True, True]])
    real = mask[..., None] & mask[:, None] & np.tri(3, dtype=bool)[None]
    row = places.causal(mask)
    np.testing.assert_array_equal(places.visible(row, row), real)
    prompt = jnp.array([[True, False], [True, True]])
    seen = places.visible(row, places.shared(prompt))
    np.testing.assert_array_equal(seen, mask[..., None] & prompt[..., None, :])
