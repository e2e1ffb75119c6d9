"""ChatMemory: the exact token ids of each conversation, so that the next turn begins with them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cachedattn.request import Request
from cachedattn.tokenizer import Message, Tokenizer

ChatName = tuple[str, str | None]  # tenant and conversation

_MAX_CONVERSATIONS = 4096  # remembered; the least recently used one is tokenised again


@dataclass(frozen=True)
class _Known:
    """The ids of a turn that is over. `marks`: the first `chars` of the text, as the client has it,
    are the first `tokens` of the ids; the longest first."""

    text: str
    ids: list[int]
    marks: list[tuple[int, int]]


class ChatMemory:
    """What a client sends back as text need not become the ids that the model generated, and
    history is found by ids. So while the chat's text goes on from the text of known ids, those
    ids are taken, and only what follows is tokenised."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: OrderedDict[ChatName, _Known] = OrderedDict()

    def prompt_ids(self, chat: ChatName, messages: Sequence[Message]) -> list[int]:
        """Token ids of the chat up to where the answer begins."""
        text = self.tokenizer.render(messages)
        known = self._known.get(chat)
        for chars, tokens in known.marks if known else []:
            if text.startswith(known.text[:chars]):
                return known.ids[:tokens] + self._encode(text[chars:])
        return self._encode(text)

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
        """Keeps the ids of a finished turn.

        The client has the text of the reply: without special tokens that were generated, and cut
        at a stop string. In the latter case the ids are known up to the reply.
        """
        assert request.text_stream is not None
        ids, prompt = list(request.tokens), request.prompt_ids
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        marks = [(len(text), len(prompt))]
        if not request.text_stream.stopped:
            by_token = request.finish_reason == "stop"
            text += request.text_stream.text
            marks.insert(0, (len(text), len(ids) - by_token))
            if by_token:
                text += self.tokenizer.decode(ids[-1:], skip_special_tokens=False)
                marks.insert(0, (len(text), len(ids)))
        self._known[chat] = _Known(text, ids, marks)
        self._known.move_to_end(chat)
        if len(self._known) > _MAX_CONVERSATIONS:
            self._known.popitem(last=False)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
