"""Rows: sources, the embedded language, tokenizers, the Dataset, packed step-addressed batches."""
