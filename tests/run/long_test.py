"""A long run holds no more at its end than after its start: files, threads, arrays."""

import gc
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.rl.types import State
from caprl_jax.run import checkpoint, host, metrics
from caprl_jax.run.task import Task

EVERY = {"checkpoint.every": 20, "eval.every": 30, "log_every": 3}
# The loop is at the same place of its periods, none of which ends there.
WARM, LATE, STEPS = 75, 195, 200


@jax.jit
def count(state, batch, key):
    """A step that adds 1 to everything."""
    del key
    one = {"reward": (batch[0], jnp.float32(1)), "skipped_updates": (0 * batch[0], jnp.float32(1))}
    return jax.tree.map(lambda a: a + 1, state), one


def held():
    """Counts what this process holds, by kind."""
    gc.collect()
    live = jax.live_arrays()
    return {
        "open files": host.resources().get("open_files", 0),
        "threads": threading.active_count(),
        "arrays": len(live),
        "bytes of arrays": sum(a.nbytes for a in live),
        "programs": count._cache_size(),
    }


def test_a_long_run_holds_no_more_at_its_end_than_after_its_first_steps(tmp_path):
    """The loop with its metrics, TensorBoard, checkpoints and evaluations, around a cheap step.

    The figures are counts at the same point between two steps, so no machine's speed counts.
    """
    seen, checkpoints = {}, checkpoint.Checkpoints(tmp_path, keep=2)

    def data(done):
        for step in range(done + 1, STEPS + 2):
            if step in (WARM, LATE):
                checkpoints.latest()  # no save is under way
                seen[step] = held()
            yield np.full(3, step, np.float32)

    c = config_lib.default()
    c.update_from_flattened_dict(EVERY | {"steps": STEPS})
    task = Task(
        policy=None,
        source=tmp_path,
        step=count,
        traces=lambda: 1,
        data=data,
        place=jax.device_put,
        evaluate=lambda params: ({"accuracy_greedy": float(params["w"][0, 0])}, {}),
    )
    state = State(jnp.int32(0), {"w": jnp.zeros((64, 64))}, ())
    with checkpoints:
        train.Loop(config_lib.complete(c), tmp_path, task, checkpoints).train(state)
    warm = seen[WARM]
    assert seen[LATE] == warm
    if sys.platform.startswith("linux"):
        assert warm["open files"] > 3
        lines = metrics.read(tmp_path)
        assert all(line["open_files"] > 0 and line["host_rss_bytes"] > 0 for line in lines)
    assert warm["arrays"] >= 2
