"""What the frontend answers; an error of it is a class of its own, no ValueError."""


class MessageError(Exception):
    pass
