"""What a client may send: one module for each kind of body."""
