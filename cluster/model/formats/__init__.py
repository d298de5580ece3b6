"""How a checkpoint may store a projection's weight: one class a format, and their registry."""
