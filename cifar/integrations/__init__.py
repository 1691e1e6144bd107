"""cifar.integrations."""
