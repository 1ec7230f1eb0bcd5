"""The one exception for a user's mistake."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence saying what to do."""
