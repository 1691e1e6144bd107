"""`python -m cifar`."""

from cifar.cli.app import run

run()
