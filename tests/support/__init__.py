"""What tests share: real ranks, an oracle of values, checkpoints written by stock torch."""
