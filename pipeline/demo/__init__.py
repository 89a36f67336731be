"""``shardferry demo``: the whole story on one machine, with a small real language model."""
