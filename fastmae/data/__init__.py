"""From shards to batches on the device: order, augmentation, workers, shared memory, the loader."""
