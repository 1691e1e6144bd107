"""What is timed, each a command with its own JSON; `python -m benchmarks` runs those that fit the machine."""
