"""What a part lacks."""


class NotInstalled(Exception):
    """Names what is missing and how to get it."""
