"""Exact and reference answers, and learners judged by them."""
