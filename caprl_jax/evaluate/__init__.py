"""Evaluation on held-out images: writes, judges and scores captions.

`python -m caprl_jax.evaluate` measures any captions: mcq.py has its figures, results.py the form of
its results, page.py with panels.py its page.
"""
