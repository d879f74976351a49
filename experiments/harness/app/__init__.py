"""What a program needs around its work: flags, errors, signals, processes."""
