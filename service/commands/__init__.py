"""Commands that run an engine in this process, without HTTP. Importing them loads no torch."""
