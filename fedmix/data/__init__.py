"""From a hospital's files, or from the phantom generator, to prepared shards and batches."""
