"""What the studies share; what ``python -m laplace_debiased`` has is taken from it."""
