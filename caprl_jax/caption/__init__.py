"""Captions of many images: `python -m caprl_jax.caption`.

job.py captions batches of images of one size, parts.py keeps what is done and puts it together,
pictures.py finds the images. Start at job.caption.
"""
