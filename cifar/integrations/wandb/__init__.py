"""cifar.integrations.wandb."""
