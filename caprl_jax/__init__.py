"""CapRL in JAX: reinforcement learning of image captions, scored by a judge that reads."""
