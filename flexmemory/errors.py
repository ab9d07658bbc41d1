"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Bad input. The message is one line that names the field, the value and the mend; commands print it and exit with 2."""
