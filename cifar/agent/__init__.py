"""cifar.agent.agent."""
