"""Tasks from texts."""
