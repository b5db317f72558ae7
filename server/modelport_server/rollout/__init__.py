"""Rollout: which versions should be loaded, and the next step towards that."""
