"""Order of training data: each usable record once an epoch, however processes cut the batches."""

import json

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from caprl_jax.data.pipeline import Feed, train_iterator
from caprl_jax.data.set_aside import SetAside

from .strategies import rare

QUESTIONS = json.dumps([{"question": "?", "choices": ["a", "b"], "answer": "A"}])


def source_of(usable):
    """Stored records numbered from 1, of which some have no questions."""
    return [
        {"id": str(i), "image": b"", "facts": "[]", "questions": QUESTIONS if good else "[]"}
        for i, good in enumerate(usable, 1)
    ]


def numbered(record, rng):
    return {"number": np.int32(record.id), "drawn": np.int64(rng.integers(1 << 62))}


def batches(source, feed, start=0, aside=None):
    """Arrays {number, drawn} [batches, rows of this process]."""
    made = list(train_iterator(source, numbered, feed, aside or SetAside(), start))
    return {k: np.stack([b[k] for b in made]) for k in made[0]} if made else None


@rare
@given(
    st.lists(st.booleans(), min_size=1, max_size=9).filter(any),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.data(),
)
@example([True, False, True], 2, 2, 0, None)
def test_every_usable_record_comes_once_an_epoch_in_an_order_of_the_seed_alone(
    usable, processes, own, seed, data
):
    source, batch, aside = source_of(usable), processes * own, SetAside()
    whole = batches(source, Feed(batch, seed, 1, 1), aside=aside)
    wanted = [i for i, good in enumerate(usable, 1) if good]
    numbers = whole["number"]
    assert sorted(numbers[numbers > 0]) == wanted
    assert sorted(map(int, aside.reasons)) == [i for i, good in enumerate(usable, 1) if not good]
    parts = [
        batches(source, Feed(batch, seed, 2, 1, range(p * own, (p + 1) * own)))
        for p in range(processes)
    ]
    for name, expected in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts], 1), expected)
    start = data.draw(st.integers(0, len(numbers) + 1)) if data else 1
    rest = batches(source, Feed(batch, seed, 1, 1), start)
    assert (rest is None) == (start >= len(numbers))
    if rest:
        np.testing.assert_array_equal(rest["drawn"], whole["drawn"][start:])
