"""Benchmarks: this project's speed against the device's limits and against its peers."""
