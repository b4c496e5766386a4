"""Caption lengths of benchmarks: distributed as stated, and no caption has another."""

import numpy as np
import pytest

from caprl_jax.bench import lengths
from caprl_jax.bench.lengths import Lengths
from caprl_jax.errors import ConfigError


def test_natural_lengths_have_the_stated_mean_and_deviation_at_any_limit():
    for limit, mean, deviation in ((4096, 500, 300), (512, 62.5, 37.5)):
        found = lengths.parse("natural", limit)
        assert (found.mean, found.deviation) == (mean, deviation)
        drawn = found.draw((128, 8), limit)
        assert drawn.mean() == pytest.approx(mean, rel=0.01)
        assert drawn.std() == pytest.approx(deviation, rel=0.05)
        assert drawn.min() >= 1 and drawn.max() <= limit


def test_lengths_are_log_normal():
    logs = np.log(Lengths(500, 300).draw((100, 100), 10**6))
    assert logs.std() == pytest.approx(np.sqrt(np.log(1 + 0.36)), rel=0.01)
    assert np.mean((logs - logs.mean()) ** 3) / logs.std() ** 3 == pytest.approx(0, abs=0.02)


def test_a_small_batch_has_the_mean_too_and_images_differ():
    drawn = Lengths(64, 38).draw((2, 8), 512)
    assert drawn.mean() == pytest.approx(64, rel=0.05)
    assert sorted(drawn[0]) != sorted(drawn[1])
    assert not np.array_equal(drawn, Lengths(64, 38).draw((2, 8), 512, seed=1))


def test_lengths_beyond_the_limit_are_cut():
    drawn = Lengths(60, 60).draw((4, 8), 64)
    assert drawn.max() == 64 and (drawn == 64).sum() > 4


def test_without_a_deviation_all_are_alike():
    assert set(lengths.parse("64,0", 512).draw((2, 8), 512).ravel()) == {64}
    assert lengths.parse("fixed", 512) is None


@pytest.mark.parametrize("text", ["long", "64", "0,3", "64,-1", "64,3,1"])
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match="give fixed, natural, or a mean from 1"):
        lengths.parse(text, 512)


def test_the_distribution_is_told_with_what_was_drawn():
    natural = Lengths(64, 38)
    told = lengths.tell(natural, natural.draw((2, 8), 512))
    assert "log-normal lengths, mean 64, deviation 38; drawn: mean 6" in told
    assert lengths.tell(None, np.full((2, 8), 512)) == "16 captions of 512 tokens, the limit"
