"""A run around its step: build.py makes it from a config, load.py reads models and data, compile.py
jits the step, and checkpoint.py, export.py, metrics.py and summary.py write what a run leaves."""
