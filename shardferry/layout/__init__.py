"""Compute which regions of each tensor a rank holds, from the spec of a target topology or from live tensors."""
