"""Batches that several processes read together, each its rows of every batch."""

import grain
from grain.sharding import NoSharding, ShardOptions

ALL_ROWS = NoSharding()


def batch(dataset: grain.MapDataset, batch_size: int, shard: ShardOptions) -> grain.MapDataset:
    """The equal share that a shard has of the rows of every whole batch, in their order.

    The batches of all shards put together, and the place in them, are the same for any number of
    shards.
    """
    # Without drop_remainder, Grain 0.2.18 rounds the length of an endless dataset up, beyond an
    # index.
    shares = dataset.batch(batch_size // shard.shard_count, drop_remainder=True)
    return shares[shard.shard_index :: shard.shard_count]
