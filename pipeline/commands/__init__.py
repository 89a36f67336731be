"""What the commands do; `shardferry.pipeline.cli` lists them, with their options."""
