"""The machine: CPUs and GPUs, disk space, signals, and what environment.json says of it."""
