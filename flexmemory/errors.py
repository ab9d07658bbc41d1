"""The one exception that a user's mistake raises, and the hint that ends most of its messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names the field, the value and the mend; commands
    print it and exit with 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?", or the list of what there is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
