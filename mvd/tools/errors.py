"""The exception for a mistake that the user can mend."""


class UserError(Exception):
    """Its message is one line that says what is wrong and what to do.

    The scripts print it after "error:" and exit with status 2. Any other exception is a bug of
    ours and keeps its traceback.
    """


class BadMember(Exception):
    """A file or an object of a data set cannot be used; the text says why.

    It is left out, counted and named, and the run goes on.
    """
