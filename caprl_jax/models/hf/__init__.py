"""Hugging Face model directories.

files.py loads and saves weights, tensors.py maps names and shapes, download.py fetches directories,
and sizes.py lists the published sizes.
"""
