"""What was lost: likelihood, diversity, tails, and the exact divergence to a known truth."""
