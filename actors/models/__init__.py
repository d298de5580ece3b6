"""The forward pass of each model family, and its weights."""
