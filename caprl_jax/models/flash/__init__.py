"""Attention whose scores stay on chip, by kernels of our own.

`merge.attend` merges segments of keys and values, and has a gradient; `calls` computes one of them
and chooses the kernel. `gpu` has the kernels for NVIDIA GPUs, `tpu` those for TPUs; `blocks` has
the form in which both take their arrays. A kernel derives who sees whom from places of tokens, and
skips the blocks that can't see each other.
"""
