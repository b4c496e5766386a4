"""Batches of items of one size."""

import collections
from collections.abc import Callable
from typing import Any


class BySize:
    """Collects items of one size until they make a batch."""

    def __init__(self, batch: int, run: Callable[[list], None]):
        """Takes the number of items in a batch, and what to do with them."""
        self._batch, self._run = batch, run
        self._waiting: dict[Any, list] = collections.defaultdict(list)

    def take(self, size: Any, item: Any) -> None:
        """Takes an item, and runs the batch that it fills."""
        self._waiting[size].append(item)
        if len(self._waiting[size]) == self._batch:
            self._run(self._waiting.pop(size))

    def flush(self) -> None:
        """Runs the batches that are not full, and those of items that come meanwhile."""
        while self._waiting:
            self._run(self._waiting.pop(min(self._waiting)))
