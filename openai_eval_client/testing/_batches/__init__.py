"""The Files and Batches endpoints."""
