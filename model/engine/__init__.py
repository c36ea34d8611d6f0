"""Runs the engine: schedule, draft, verify and emit for all sequences of a batch, with the caches around it.

May import model.drafters and everything below it. Start reading at `Engine` in engine.py.
"""
