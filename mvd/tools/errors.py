"""The one exception that stands for a mistake by the user."""


class UserError(Exception):
    """Something the user can mend: its message is one line that says what is wrong and what to do.

    The scripts print it after "error:" and exit with status 2; any other exception is a bug of ours and keeps its traceback.
    """
