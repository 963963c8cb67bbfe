"""Tasks drawn from a formula."""
