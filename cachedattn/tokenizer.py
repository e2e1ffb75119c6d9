"""Text to token ids and back, chat templates, and text that streams."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

Message = dict[str, str]  # {'role': 'system' | 'user' | 'assistant', 'content': text}

_BROKEN = "\ufffd"  # what decoding gives for bytes that are not a whole character


class Tokenizer:
    """A `tokenizers.Tokenizer` with its chat template.

    `special_tokens` maps 'bos_token', 'eos_token', ... to their text, for the template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = special_tokens or {}
        self._template = compile_template(chat_template) if chat_template else None

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """From tokenizer.json (None without one), tokenizer_config.json, chat_template.jinja."""
        if not (directory / "tokenizer.json").exists():
            return None
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {}
        if (directory / "tokenizer_config.json").exists():
            config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (directory / "chat_template.jinja").exists():
            template = (directory / "chat_template.jinja").read_text("utf-8")
        special_tokens = {}
        for name, value in config.items():
            if name.endswith("_token"):
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    special_tokens[name] = text
        return cls(backend, template, special_tokens)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The id of 'eos_token', if there is one."""
        token = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        return () if token is None else (token,)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it count as such."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The chat as the model was trained to see it. ValueError: no template, or it refuses."""
        if self._template is None:
            raise ValueError("this model has no chat template: pass text or token ids")
        import jinja2

        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None


def compile_template(source: str) -> Any:
    """A template of a checkpoint, which is not trusted: it runs in Jinja's sandbox."""
    import jinja2
    import jinja2.sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the checkpoint's chat template does not compile: {error}") from None


class TextStream:
    """Turns generated tokens into text as they come.

    Text is held back while it may still change: an unfinished character, or the beginning of a
    stop string. `text` is what has been given out.
    """

    _CONTEXT = 8  # tokens decoded again before new ones, so that spacing comes out right

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.text = ""
        self.stopped = False  # a stop string came; nothing follows
        self._ids: list[int] = []
        self._first = 0  # ids before this are not decoded any more
        self._decoded = 0  # ids before this are in the text, or held back
        self._held = ""

    def push(self, token: int) -> str:
        """Takes a token; the text that became certain with it."""
        self._ids.append(token)
        before = self.tokenizer.decode(self._ids[self._first : self._decoded])
        after = self.tokenizer.decode(self._ids[self._first :])
        if after.endswith(_BROKEN) or len(after) < len(before):
            return ""
        self._decoded = len(self._ids)
        self._first = max(self._first, self._decoded - self._CONTEXT)
        return self._give_out(after[len(before) :])

    def finish(self) -> str:
        """No token follows; the rest of the text."""
        if self.stopped:
            return ""
        before = self.tokenizer.decode(self._ids[self._first : self._decoded])
        after = self.tokenizer.decode(self._ids[self._first :])
        rest = self._give_out(after[len(before) :])
        if not self.stopped:  # what was held back did not become a stop string
            rest += self._held
            self.text += self._held
        self._decoded, self._held = len(self._ids), ""
        return rest

    def _give_out(self, text: str) -> str:
        text = self._held + text
        self._held = ""
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        else:
            keep = max((_overlap(text, stop) for stop in self.stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
