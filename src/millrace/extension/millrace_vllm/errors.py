"""The error that becomes the answer to a call."""


class RpcError(Exception):
    """The call cannot be carried out. Its answer is the message."""
