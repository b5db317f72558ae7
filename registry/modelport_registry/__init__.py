"""modelport_registry."""
