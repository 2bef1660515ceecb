"""Hints for a name that does not exist."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint with the valid name nearest to `name`, and all of them."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}there is: {', '.join(names) or 'none'}"
