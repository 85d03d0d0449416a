"""Infer tasks, one file a panel of the clients."""
