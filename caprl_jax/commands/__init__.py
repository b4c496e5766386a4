"""Commands that stand by themselves; `python -m caprl_jax.NAME` runs commands/NAME.py.

`cli` holds what the commands share: logging, flags, and errors told in one paragraph.
"""
