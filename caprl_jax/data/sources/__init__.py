"""Data sources for images and questions, one file each.

A source is a function `source(settings, set_aside, options)` that returns two sequences of stored
elements, {"train": .., "heldout": ..}. records.stored makes such a sequence from Records in memory;
array_record.builder writes Records to disk once. `settings` is the config's section `data`
(data.settings.Data), and `set_aside` collects unusable records. Register a source here, or name it
in a config by its import path.
"""

from caprl_jax.data.sources.digits import digits
from caprl_jax.data.sources.files import files
from caprl_jax.data.sources.prepared import prepared
from caprl_jax.registry import Registry

SOURCES = Registry("data source", ("settings", "set_aside"))
SOURCES.register("digits")(digits)
SOURCES.register("files")(files)
SOURCES.register("prepared")(prepared)
