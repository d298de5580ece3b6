"""The HTTP front door: routes, bodies, replies, access, health. Knows nothing about Ray or how tokens are made."""
