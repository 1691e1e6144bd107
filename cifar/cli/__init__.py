"""cifar.cli.app."""
