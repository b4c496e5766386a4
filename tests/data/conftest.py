"""The tiny policy's tokenizer and buckets, which the tests of data share."""

import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.run import load


@pytest.fixture(scope="session")
def tiny():
    """(tokenizer, image prompt) of the tiny policy."""
    c = config_lib.default()
    c.data.max_windows, c.data.max_prompt = 4, 32
    policy, directory = load.read_model(c.policy.path, "", np.float32)
    tokenizer = Tokenizer.from_pretrained(directory, 512)
    return tokenizer, load.image_prompt(c, policy, directory, tokenizer)
