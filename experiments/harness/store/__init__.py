"""What is kept on disk: files, checkpoints, records, and whose they are."""
