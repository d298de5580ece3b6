"""The pure half of an engine step: the scheduler and the KV blocks."""
