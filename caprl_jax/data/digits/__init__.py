"""The embedded world: world.py draws scenes and asks questions; sft.py makes SFT examples."""
