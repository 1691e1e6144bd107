"""cifar.sweeps."""
