"""Similarities of captions and images by CLIP: `python -m caprl_jax.similarity`.

lines.py finds the image of each line of captions, towers.py runs CLIP on them, job.py goes through
the lines. Start at job.score.
"""
