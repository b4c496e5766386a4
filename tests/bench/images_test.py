"""The bench of the data pipeline reads what a run would, as large as a run's may be."""

import pytest

from caprl_jax.bench import images
from caprl_jax.errors import ConfigError

from .. import shipped


def test_the_pipelines_images_fill_the_buckets_of_the_3b_config():
    config = shipped.module("3b").get_config("h200_8")
    config.data.batch = 8
    pace = images.measure(config, 1)
    assert pace.side == 32 * 28  # 1024 features
    assert pace.batch == 8 and len(pace.seconds) == 1
    # Patches of 3 x 2 x 14 x 14 float32 values, 64 a window, in every window of the bucket.
    assert pace.held > config.data.max_windows * 64 * 1176 * 4
    assert f"{pace.images_a_second:.1f} images/s" in images.tell(pace)


def test_the_rate_is_over_all_batches():
    assert images.Pace([1.0, 3.0], batch=8, side=28, threads=1, held=0).images_a_second == 4


def test_a_bucket_too_small_for_the_pictures_is_refused():
    config = shipped.module("3b").get_config()
    config.data.max_windows = 4
    with pytest.raises(ConfigError, match=r"config\.data\.max_windows=4"):
        images.measure(config, 1)
