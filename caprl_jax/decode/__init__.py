"""The decode loop: loop.py draws the tokens, caches.py holds keys and values, sampling.py picks a
token from logits, and scheduling.py says which caption is drawn in which row."""
