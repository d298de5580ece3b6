"""Pieces of event streams on their way from replicas to Serve's proxy, beside Serve's own way."""
