"""The dry run: what each rank would read, from the checkpoint's metadata alone."""
