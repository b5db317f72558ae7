"""Batching: one bounded queue per servable; rows of many calls become one engine call."""
