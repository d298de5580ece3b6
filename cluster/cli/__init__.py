"""The command line, its views, benches, and offline generation."""
