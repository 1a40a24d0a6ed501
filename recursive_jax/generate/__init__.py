"""Sampling rules, the jitted decode, and generation in request order."""
