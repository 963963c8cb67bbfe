"""Published experiments as TOML files."""
