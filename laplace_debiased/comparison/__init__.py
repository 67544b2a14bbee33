"""The comparison that ``python -m laplace_debiased`` runs."""
