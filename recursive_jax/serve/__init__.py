"""The engine behind an OpenAI-compatible API: app.py (what is there to ask), protocol.py (requests and answers),
lanes.py (engines on threads)."""
