"""The page at /: what is served of it, and as what. Its own files lie in `static`."""
