"""cifar.system."""
