"""State that stays in the memory of the cluster."""
