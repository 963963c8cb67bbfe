"""Fast convolutions and small matrix products, with C++ kernels for CPUs that are compiled on first use."""
