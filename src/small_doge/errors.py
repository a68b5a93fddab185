"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can put right.

    The message is one sentence that names the thing, what was found and what is expected. The command line prints
    it without a traceback and exits with status 1.
    """
