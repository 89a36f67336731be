"""The examples, run as somebody runs them."""
