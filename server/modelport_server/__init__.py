"""The server: a front process that answers gRPC calls and engine processes that run the models."""
