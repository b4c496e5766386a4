"""The embedded world: world.py draws scenes and asks questions; sft.py makes SFT examples."""

GRID, DIGITS = (3, 3), (2, 5)  # rows and columns; least and most digits of a scene
