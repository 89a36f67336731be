"""What crosses from a loader to its trainer, and by which transport."""
