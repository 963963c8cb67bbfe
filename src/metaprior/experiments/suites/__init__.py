"""Trainings that belong together, as TOML files (see `metaprior.experiments.suite`)."""
