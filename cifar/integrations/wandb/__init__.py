"""Weights & Biases: mirroring runs, sweeps that W&B runs, reading runs back, and publishing reports.

No other part of cifar imports wandb.
"""
