"""Programs for runs on several processes, machines or accelerators."""
