"""Comparisons of runs that differ in a few keys: `python -m caprl_jax.sweep`.

arms.py reads and checks a sweep's config file, runs.py starts its runs one after the other,
figures.py has means, intervals and the table, plot.py the picture. Start at arms.Sweep.
"""
