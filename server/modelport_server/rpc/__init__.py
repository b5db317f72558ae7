"""gRPC: the one place that decodes requests, encodes answers and turns errors into statuses."""
