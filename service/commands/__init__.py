"""Commands that run an engine in this process, without HTTP.

May import everything of the service and of model; `service.cli` imports them. Importing them loads no torch.
"""
