"""Watches over `isotherm serve` from a process without Ray, and ends all of it."""
