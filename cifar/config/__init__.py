"""cifar.config.resolve."""
