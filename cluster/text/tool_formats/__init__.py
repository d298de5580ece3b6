"""The formats in which models write tool calls: how each is read as it comes, and how it can be enforced."""
