"""The checks that a version passes before it takes traffic."""
