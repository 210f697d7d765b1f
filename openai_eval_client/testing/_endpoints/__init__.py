"""The endpoints that generate answers."""
