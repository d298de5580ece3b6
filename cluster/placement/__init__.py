"""Which expert group holds which expert: the table, its changes, and the policy."""
