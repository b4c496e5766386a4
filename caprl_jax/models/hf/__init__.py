"""Hugging Face model directories.

files.py reads configs and weights, save.py writes them, tensors.py maps names and shapes,
download.py fetches directories, and sizes.py lists the published sizes.
"""
