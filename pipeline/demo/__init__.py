"""``shardferry demo``: train, save, load through the stage and train further, with a small language model on one machine."""
