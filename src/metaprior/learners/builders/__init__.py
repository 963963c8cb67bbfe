"""Building blocks of learners: gradient steps, metrics, networks that read the support, variational inference."""
