"""The foundation of the library: the types of tasks and learners, likelihoods, options, files and devices."""
