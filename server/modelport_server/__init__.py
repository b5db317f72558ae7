"""modelport_server."""
