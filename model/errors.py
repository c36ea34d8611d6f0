"""Errors that tell people what to change. Everything may import this; it imports nothing."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and says what would do."""
