"""From images to batches: shards are written, indexed, read, decoded and cropped here, each in its own file."""
