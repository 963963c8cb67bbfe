"""Referees: exact or reference answers to compare learners with."""
