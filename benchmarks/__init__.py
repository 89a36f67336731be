"""One script a claim; each states machine, data and command."""
