"""The sandbox of external systems with switchable faults; it knows nothing of the mesh."""
