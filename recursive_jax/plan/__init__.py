"""Plans: what a run will take on hardware that is not here (`recursive-jax plan`, `recursive_jax.plan.plan`)."""
