"""Engines: what runs a model, in a process of its own, and the front's handle on that process."""
