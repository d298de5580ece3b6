"""What processes tell each other: requests, operations, membership, meters. Frozen data, hardly any logic."""
