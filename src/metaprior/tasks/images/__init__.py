"""Tasks from pictures."""
