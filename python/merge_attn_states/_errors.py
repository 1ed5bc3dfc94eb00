"""The errors of this package that have a type of their own."""

__all__ = ["UnavailableError"]


class UnavailableError(RuntimeError):
    """No kernel for the call, in this build or on this machine; the message says what is missing.

    It stays so for the whole process. What CUDA refuses at one moment is a plain RuntimeError.
    """
