"""State, optimizer, the jitted step, the loop, the checkpoint."""
