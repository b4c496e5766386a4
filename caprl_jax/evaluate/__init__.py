"""Evaluation on held-out images: writes, judges and scores captions."""
