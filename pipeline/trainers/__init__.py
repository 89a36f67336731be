"""What a stage does with live trainers: deliver to them, load in them, take their state."""
