"""An expert group: its experts, and the loops that serve them."""
