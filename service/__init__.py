"""The HTTP service: routes, admission, media decoding, worker pool and streams.

May import `model.request`, `model.config` and `model.errors`, which load no torch; `commands` and the worker process
also import the engine, when they run. Nothing in `model` imports the service.
"""
