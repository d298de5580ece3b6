"""An attention shard: engine, step loop, exchange with the experts, delivery of deltas."""
