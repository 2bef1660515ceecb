"""What the system can hold as the path of a file."""

import errno
import os


def path_problem(path: str) -> str:
    """Why there can be no file of this path here; empty where there can, whether or not it is."""
    try:
        os.lstat(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return str(error.strerror) if error.errno == errno.ENAMETOOLONG else ""
    return ""
