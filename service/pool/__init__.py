"""Engine processes: start, supervise and restart them, and move their requests to another one when one dies.

May import `service.errors`, `service.log`, `service.settings`, `service.cores` and `model.request`; never HTTP.
Only `worker.py`, which runs in the engine process, loads an engine.
"""
