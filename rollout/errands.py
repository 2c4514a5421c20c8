"""What other threads ask a thread to do for them, so that its state needs no locks."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")


class Errands:
    """A queue of calls. The owner's thread runs them in order; `wake` makes it look."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._queue: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closed = False

    def send(self, errand: Callable[[], T]) -> Future[T]:
        """Any thread: have it run. Once closed, nothing runs it."""
        answer: Future[T] = Future()
        self._queue.append((errand, answer))
        if self._closed:
            answer.cancel()
        else:
            self._wake()
        return answer

    def ask(self, question: Callable[[], T], *, timeout_s: float) -> T:
        """Any thread: wait for the answer. TimeoutError if the owner is busy; once it has ended, the caller answers."""
        answer = self.send(question)
        try:
            return answer.result(timeout=timeout_s)
        except CancelledError:
            return question()
        except TimeoutError:
            raise TimeoutError(f"the thread that was asked has been busy for more than {timeout_s:g} s") from None

    def run(self) -> None:
        """The owner's thread: do all that is asked. An error goes to both sides."""
        while self._queue:
            errand, answer = self._queue.popleft()
            try:
                answer.set_result(errand())
            except Exception as error:
                answer.set_exception(error)
                raise

    def close(self) -> None:
        """The owner's thread, last of all: answer nobody any more."""
        self._closed = True
        while self._queue:
            self._queue.popleft()[1].cancel()
