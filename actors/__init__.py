"""Ray and torch.distributed: loader actors, their placement, their process group."""
