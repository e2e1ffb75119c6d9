"""ChatMemory: the exact token ids of each conversation, so that the next turn begins with them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from cachedattn.request import Request
from cachedattn.tokenizer import Message, Tokenizer

ChatName = tuple[str, str | None]  # tenant and conversation

_MAX_CONVERSATIONS = 4096  # remembered; the least recently used one is tokenised again


class ChatMemory:
    """What a client sends back as text need not become the ids that the model generated, and
    history is found by ids. So while the chat's text goes on from the text of known ids, those
    ids are taken, and only what follows is tokenised."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: OrderedDict[ChatName, tuple[str, list[int]]] = OrderedDict()

    def prompt_ids(self, chat: ChatName, messages: Sequence[Message]) -> list[int]:
        """Token ids of the chat up to where the answer begins."""
        text = self.tokenizer.render(messages)
        known_text, known_ids = self._known.get(chat, ("", []))
        if not text.startswith(known_text):
            known_text, known_ids = "", []
        return known_ids + self._encode(text[len(known_text) :])

    def num_system_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens come before the first user's words: the system prompt, if any."""
        before = []
        for message in messages:
            if message["role"] == "user":
                break
            before.append(message)
        head = self.tokenizer.render([*before, {"role": "user", "content": ""}])
        pairs = zip(head, self.tokenizer.render(messages), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return len(self._encode(head[:same]))

    def remember(self, chat: ChatName, request: Request) -> None:
        """Keeps the ids of a finished turn."""
        ids = list(request.tokens)
        self._known[chat] = (self.tokenizer.decode(ids, skip_special_tokens=False), ids)
        self._known.move_to_end(chat)
        if len(self._known) > _MAX_CONVERSATIONS:
            self._known.popitem(last=False)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
