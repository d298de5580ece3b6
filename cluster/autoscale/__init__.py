"""What the load is and will be, and what the autoscaler does about it. Acts only through operations."""
