"""caprl_jax.main, which looks for changes to send five times a second."""

import runpy

from caprl_jax.run import bucket

if __name__ == "__main__":
    bucket._PAUSE = 0.2
    runpy.run_module("caprl_jax.main", run_name="__main__", alter_sys=True)
