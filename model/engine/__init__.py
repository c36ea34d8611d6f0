"""The engine: schedule, draft, verify, emit, for all sequences of a batch, with the caches around it.

May import model.drafters and everything below it. `Engine` in engine.py is the way in.
"""
