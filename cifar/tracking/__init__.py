"""cifar.tracking."""
