"""Convolutions and small products on a processor, compiled on first use."""
