"""Who may use what: API keys, their roles and their limits."""
