"""Devices and processes: mesh.py makes the mesh, axes.py maps logical axes to it, hardware.py lists
what devices offer, and processes.py lets several processes meet, agree and stop together."""
