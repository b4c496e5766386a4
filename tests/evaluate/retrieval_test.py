"""Retrieval by facts: a caption finds its image if more of it is true there than elsewhere."""

import numpy as np
import pytest

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.records import Record
from caprl_jax.evaluate.heldout import Written, fact_retrieval

RED, BLUE, ONE = ["north", "red", 3], ["center", "blue", 4], ["east", "green", 1]
SCENES = ([RED, BLUE], [RED, ONE], [BLUE], [RED, BLUE, ONE])


def share(*texts):
    """Figure of captions of the first scenes, one each."""
    records = [Record(str(i), b"", (), facts) for i, facts in enumerate(SCENES)]
    captions = [Written(i, text, []) for i, text in enumerate(texts)]
    return fact_retrieval(HeldOut(records, [], []), captions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits: north red three", 1 / 3),
        ("digits: north red three, north red three", 1 / 3),
        ("digits: north red three, center blue four", 1 / 2),
        ("digits: north red three, center blue four, total two", 1),
        ("digits: center blue four, total one", 0),
        ("digits: east green one, north red three", 0),
        ("digits: north red three, west white nine", 1 / 3),
        ("digits: west white nine", 1 / 4),
        ("", 1 / 4),
    ],
)
def test_a_caption_of_the_first_scene_by_hand(text, expected):
    assert share(text) == expected


def test_the_figure_is_the_mean_over_captions():
    found = share("digits: total two, center blue four", "digits: total two", "digits: total one")
    np.testing.assert_allclose(found, np.mean([1, 1 / 2, 1]))
