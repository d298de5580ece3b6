"""What joins a shard and a group: one protocol, and its carriers."""
