"""Selection rules and their ledger."""
