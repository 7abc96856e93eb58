"""Pictures and targets in, batches out."""
