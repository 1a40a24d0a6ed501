"""Models: one configurable Transformer, attention, and the two-function protocol any JAX model can join by."""
