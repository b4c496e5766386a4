"""Stand-alone commands; `python -m caprl_jax.NAME` runs commands/NAME.py.

`cli` holds the parts that commands share: logging, flags, and errors in one paragraph.
"""
