"""One of two processes that write checkpoints of a shared array: ADDRESS PROCESS WORKDIR FAULT..

A fault is STEP:KIND; it hurts the save of that step in process 1 alone. Kinds: "begin", whose disk
is full before; "middle", full once the save has begun; "kill", where the process then is killed.
Prints [step, last checkpoint] after each of six saves, and whether the last one comes back.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from caprl_jax import config as config_lib
from caprl_jax.parallel import processes
from caprl_jax.run import checkpoint, workdir

TRY_OUT = workdir.try_out


def full(yes: bool) -> None:
    """Refuses this process files of more than 100 bytes, or allows them again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 if yes else hard, hard))


def hurt(kind: str) -> None:
    """Makes the next save of this process fail."""
    if kind == "begin":
        full(True)
        return

    def then(directory: Path) -> None:
        TRY_OUT(directory)
        workdir.try_out = TRY_OUT
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        full(True)

    workdir.try_out = then


def state(step: int):
    """An array whose halves lie in the two processes."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    halves = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = np.random.default_rng(step).normal(size=(2, 5000)).astype(np.float32)
    return {"w": jax.make_array_from_callback(whole.shape, halves, lambda part: whole[part])}


def main() -> None:
    address, process, folder, *faults = sys.argv[1:]
    kinds = dict(fault.split(":") for fault in faults) if process == "1" else {}
    processes.HEARTBEAT = 10
    processes.start(address, 2, int(process))
    config = config_lib.complete(config_lib.default())
    with processes.together(), checkpoint.Checkpoints(Path(folder), keep=2) as checkpoints:
        for step in range(1, 7):
            if kind := kinds.get(str(step)):
                hurt(kind)
            checkpoints.save(step, state(step), config)
            last = checkpoints.latest()
            full(False)
            print(json.dumps([step, last]), flush=True)
        checkpoints.require_saved()
        restored, expected = checkpoints.restore_last(state(0))["w"], state(6)["w"]
        print(json.dumps(bool((restored == expected).all())), flush=True)


if __name__ == "__main__":
    main()
