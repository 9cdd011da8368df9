"""The error a user can mend: the command line prints it as one line and exits with code 2."""


class UserError(Exception):
    """Bad input. The message is one line: the file, key, line or shape at fault, and what to do."""


class SampleError(UserError):
    """One faulty sample: training skips it, counts it and reports it; evaluation stops at it."""
