"""The one exception that is the user's to mend, shown as one line without a traceback."""

from helpers.study.plain_text import message


class StudyError(ValueError):
    """Something in the study's inputs is wrong.

    The message is one line: the place, the value, the limit and the remedy. Values come
    from files of any origin, so that nothing in it acts on the terminal it is shown on.
    """

    def __init__(self, text: object):
        super().__init__(message(text))
