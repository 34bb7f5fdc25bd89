"""One conversation a visitor."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

Talk = TypeVar("Talk")
Talk_co = TypeVar("Talk_co", covariant=True)


class Starts(Protocol[Talk_co]):
    """What starts conversations."""

    def new_chat(self) -> Talk_co:
        """A conversation without a history."""
        ...


class Sessions(Generic[Talk]):
    """One chat a visitor; the one idle for longest is forgotten when there are more than ``capacity``."""

    def __init__(self, model: Starts[Talk], capacity: int = 16) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._model, self._capacity = model, capacity
        self._chats: OrderedDict[str, Talk] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Talk:
        """The chat of ``key``, new when there is none."""
        with self._lock:
            chat = self._chats.pop(key) if key in self._chats else self._model.new_chat()
            self._chats[key] = chat
            while len(self._chats) > self._capacity:
                self._chats.popitem(last=False)
            return chat

    def __len__(self) -> int:
        return len(self._chats)
