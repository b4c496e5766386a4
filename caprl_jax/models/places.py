"""Places of tokens in packed rows, from which attention derives who sees whom.

A row may hold several texts end to end. Three numbers of a token say where it belongs, so that no
mask of queries times keys has to exist in memory.
"""

import flax.struct
import jax
import jax.numpy as jnp

PAD_KEY = -1  # group of a key that nobody sees
PAD_QUERY = -2  # group of a query that sees nothing


@flax.struct.dataclass
class Places:
    """Places of a row's tokens.

    A query sees a key iff the groups are equal, the key's leaf is 0 or the query's, and the key's
    order is at most the query's. Groups don't decrease along a row, apart from padding.

    Attributes:
      group: int32 [*batch, t], the text in the row (a caption with its questions); PAD_KEY or
        PAD_QUERY for padding.
      leaf: int32 [*batch, t], 0 for the text's trunk, 1.. for its branches.
      order: int32 [*batch, t], the position that causality compares.
    """

    group: jax.Array
    leaf: jax.Array
    order: jax.Array


def causal(mask: jax.Array) -> Places:
    """Places of the keys of one text a row, each after the last.

    Args:
      mask: bool [*batch, t], True where a token is real.

    Returns:
      Places whose padding nobody sees. As queries, real tokens see the real ones up to themselves,
      and padding sees nothing.
    """
    order = jnp.broadcast_to(jnp.arange(mask.shape[-1], dtype=jnp.int32), mask.shape)
    group = jnp.where(mask, 0, PAD_KEY).astype(jnp.int32)
    return Places(group, jnp.zeros_like(order), order)


def shared(mask: jax.Array) -> Places:
    """Places of keys that every query of group 0 and leaf 0 sees, wherever it stands.

    Args:
      mask: bool [*batch, t], True where a token is real.

    Returns:
      Places whose order is 0 and whose padding nobody sees.
    """
    zeros = jnp.zeros(mask.shape, jnp.int32)
    return Places(jnp.where(mask, 0, PAD_KEY).astype(jnp.int32), zeros, zeros)


def visible(queries: Places, keys: Places) -> jax.Array:
    """Returns the mask of queries and keys: bool [*batch, t, s]."""
    group, leaf, order = (
        (q[..., :, None], k[..., None, :])
        for q, k in (
            (queries.group, keys.group),
            (queries.leaf, keys.leaf),
            (queries.order, keys.order),
        )
    )
    same_text = (group[0] == group[1]) & (group[1] >= 0)
    return same_text & ((leaf[1] == 0) | (leaf[1] == leaf[0])) & (order[1] <= order[0])
