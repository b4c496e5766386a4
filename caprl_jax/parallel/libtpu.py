"""Silences libtpu on machines without a TPU, where it prints that it finds no TPU workers."""

import glob
import os

_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
# Set on every machine with libtpu, and on every machine without a TPU.
_SET_BY_JAX = {"TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY"}
# One chip on one host: libtpu then asks no host, and JAX still finds that the chip is absent.
# Plans for a described topology (plan --topology=v5e:4x4) do not read these.
_ONE_CHIP = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
    "TPU_HOST_BOUNDS": "1,1,1",
}


def _may_have_tpu() -> bool:
    """Tells whether a device may be a TPU, or the environment configures one."""
    configured = (name for name in os.environ if name.startswith(("TPU_", "JAX_FORCE_TPU")))
    return bool(set(configured) - _SET_BY_JAX) or any(map(glob.glob, _DEVICES))


def keep_quiet() -> None:
    """Sets the environment that silences libtpu on a machine without a TPU.

    Call it before JAX's backend starts. It changes nothing on a machine with a TPU, or where the
    environment holds settings of one.
    """
    if not _may_have_tpu():
        os.environ.update(_ONE_CHIP)
