"""Examples are the same in every run, and nothing is stored between runs."""

import os

import hypothesis

# FUZZ_EXAMPLES=10000 searches longer; a failure it finds becomes an explicit @example.
hypothesis.settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("fuzz")
