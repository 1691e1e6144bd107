"""cifar.training."""
