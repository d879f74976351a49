"""A training run: its compiled program, its data on devices, its loop."""
