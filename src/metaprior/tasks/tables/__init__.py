"""Tasks from tables."""
