"""What everything else stands on: the types of tasks and learners, likelihoods, options, files, devices."""
