"""Training: the compiled program, data on devices, the loop."""
