"""`python -m cifar`."""

from cifar.cli import run

run()
