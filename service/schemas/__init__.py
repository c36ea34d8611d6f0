"""The request bodies of all routes, and the checks of their fields.

May import `service.errors`, `service.settings`, `service.body`, `service.validation` and `model.request`.
"""
