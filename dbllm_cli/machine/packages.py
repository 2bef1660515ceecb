"""Which packages are installed. Imports none of them."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """The version of an installed package, None when it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
