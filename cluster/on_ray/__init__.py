"""Every Ray call of which the rooms above are free: workers, sessions, environment, state."""
