"""Warms up: the imports and the first load take longer than a case."""

import pytest

import caprl_jax

from .models import BLACK


@pytest.fixture(scope="session", autouse=True)
def _warm():
    caprl_jax.load_policy("asset:tiny/policy").inputs([BLACK])
