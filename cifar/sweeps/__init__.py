"""Sweeps: reading a W&B sweep file, and the local backend, which hands out its trials from an Optuna storage."""
