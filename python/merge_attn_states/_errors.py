"""The package's own exceptions."""


class UnavailableError(RuntimeError):
    """This build or machine has no kernel for what a call needs."""
