"""Qwen2.5-VL and Qwen2.5 as pure functions over a tree of key-value segments."""
