"""The one exception that is the user's to mend, shown as one line without a traceback."""


class StudyError(ValueError):
    """Something in the study's inputs is wrong.

    The message is one line: the place, the value, the limit and the remedy.
    """
