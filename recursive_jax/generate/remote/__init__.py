"""Models behind OpenAI-compatible servers: model.py (what stands for one), wire.py (requests and replies as JSON),
client.py (many at once), journal.py (replies that are paid for are kept)."""
