"""Agents: processes that claim trials of a sweep and have worker processes train them."""
