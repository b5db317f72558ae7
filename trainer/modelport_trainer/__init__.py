"""modelport_trainer."""
