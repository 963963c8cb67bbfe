"""Inference of phi: the methods that several learners share."""
