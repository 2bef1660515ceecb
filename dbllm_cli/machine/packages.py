"""Which packages are installed. Imports none of them."""

from importlib import metadata


def installed_version(package: str) -> str | None:
    """The version of an installed package, None when it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
