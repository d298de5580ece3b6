"""To which attention shard a request goes, and where it goes on when that is lost."""
