"""The exception for a mistake that the user can mend."""


class UserError(Exception):
    """Its message is one line that says what is wrong and what to do.

    The scripts print it after "error:" and exit with status 2. Any other exception is a bug of
    ours and keeps its traceback.
    """
