"""Places of tokens in packed rows, from which attention derives who sees whom.

A row may hold several texts end to end. Three numbers of a token say where it belongs, so that no
mask of queries times keys has to exist in memory.
"""

import flax.struct
import jax
import jax.numpy as jnp

PAD_KEY = -1  # group of a key that nobody sees
PAD_QUERY = -2  # group of a query that sees nothing
NOTHING = -1e30  # log-sum-exp of a query that sees no key; finite, as are all of its results
MASKED = 2 * NOTHING  # score of a key that isn't seen: exp(MASKED - NOTHING) is 0
_FAR = 2**30


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


def sees(queries: Places, keys: Places) -> jax.Array:
    """Tells which keys queries see: bool, of the shape that the two broadcast to.

    Callers give padded keys and padded queries groups of their own (PAD_KEY, PAD_QUERY), so that
    padding is never seen.
    """
    leaf = (keys.leaf == 0) | (keys.leaf == queries.leaf)
    return (keys.group == queries.group) & leaf & (keys.order <= queries.order)


def visible(queries: Places, keys: Places) -> jax.Array:
    """Returns the mask of queries and keys: bool [*batch, t, s]."""
    queries = jax.tree.map(lambda a: a[..., :, None], queries)
    keys = jax.tree.map(lambda a: a[..., None, :], keys)
    return sees(queries, keys) & (keys.group >= 0)


def meeting(queries: Places, keys: Places) -> jax.Array:
    """Tells which blocks of queries and of keys may see each other.

    False is always right; True may be too cautious. Ordered by group and order within it, a key
    that is seen comes at or before its query; so it is compared with the last query of the block.

    Args:
      queries: [b, blocks, tokens of a block].
      keys: likewise.

    Returns:
      bool [b, blocks of queries, blocks of keys].
    """
    queries, keys = _Extremes(queries), _Extremes(keys)

    def pairs(of_queries, of_keys):
        return of_queries[:, :, None], of_keys[:, None, :]

    top, low = pairs(queries.group_max, keys.group_min)
    last, first = pairs(queries.last_order, keys.first_order)
    before = (low < top) | ((low == top) & (first <= last))
    bottom, high = pairs(queries.group_min, keys.group_max)
    leaf_top, leaf_low = pairs(queries.leaf_max, keys.leaf_min)
    leaf_bottom, leaf_high = pairs(queries.leaf_min, keys.leaf_max)
    leaf = (leaf_low == 0) | ((leaf_low <= leaf_top) & (leaf_high >= leaf_bottom))
    return before & (high >= bottom) & leaf


class _Extremes:
    """Extremes of the places in each block, int32 [b, blocks]; an empty range without real ones."""

    def __init__(self, places: Places):
        group, leaf, order = places.group, places.leaf, places.order
        real = group >= 0

        def least(a, where):
            return jnp.min(jnp.where(where, a, _FAR), axis=-1)

        def most(a, where):
            return jnp.max(jnp.where(where, a, -_FAR), axis=-1)

        self.group_min, self.group_max = least(group, real), most(group, real)
        self.leaf_min, self.leaf_max = least(leaf, real), most(leaf, real)
        self.first_order = least(order, real & (group == self.group_min[..., None]))
        self.last_order = most(order, real & (group == self.group_max[..., None]))
