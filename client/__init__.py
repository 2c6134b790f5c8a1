"""The hospital's door: the ClientApp that trains on a prepared shard and sends an update."""
