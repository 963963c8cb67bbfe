"""Suites of runs that belong together, as TOML files (see `metaprior.experiments.suite`)."""
