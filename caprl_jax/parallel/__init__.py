"""Devices and processes.

mesh.py makes the mesh, axes.py maps logical axes to it, slices.py and jit.py set how a program is
cut and compiled, hardware.py lists what devices offer, gpu_targets.py what the GPUs' compiler asks
of them, libtpu.py keeps the TPU's library quiet where there is none, and processes.py lets several
processes meet, agree and stop together.
"""
