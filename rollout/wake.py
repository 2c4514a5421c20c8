"""A flag that ends another thread's poll of sockets."""

import os


class Wake:
    """A file descriptor that is readable from `set` to `clear`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        """Any thread."""
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """The thread that polls."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return  # nobody had set it

    def close(self) -> None:
        """Nobody may call `set` any more."""
        os.close(self.fd)
