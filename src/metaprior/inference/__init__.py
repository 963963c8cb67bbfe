"""How phi is inferred: everything that two learners share."""
