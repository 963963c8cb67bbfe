"""Trainings by name: recipes, run folders, opened runs, suites and their results."""
