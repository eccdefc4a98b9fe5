"""The error of a read that did not complete."""


class ReadError(OSError):
    """Bytes of a file could not be read, or cannot be trusted.

    Args:
        message (str): One line for people.
        path (str): The file.
        offset (int): Where the read began in the file.
        wanted (int): Bytes that were asked for.
        got (int): Bytes that were read: all of them, if the file is no longer the one that was opened.
    """

    def __init__(self, message: str, path: str, offset: int, wanted: int, got: int):
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.wanted = wanted
        self.got = got
