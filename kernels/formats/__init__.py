"""How stored weights are computed with: one class a format, and their registry."""
