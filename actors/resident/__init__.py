"""State in the cluster's memory: what loaders keep, and what live trainers hold, as sources of other loads."""
