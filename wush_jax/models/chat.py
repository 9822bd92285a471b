"""Conversations as text: the chat template of a model's folder, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from wush_jax.storage.json_file import JSON_BYTES, check_inside, present, read_json

FILE, OLD_FILE = "chat_template.jinja", "chat_template.json"
CUT = "THE_ANSWER_GOES_ON_HERE "  # stands behind a message that is to be continued


@dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja, run in a sandbox: files are not trusted.

    Attributes:
      source: the template.
      tokens: what it may name, such as ``bos_token``.

    >>> template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "hi"}])
    '[user]hi'
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """Read the template of a folder: of its own file, or of ``tokenizer_config.json``.

        Args:
          folder: of the model.
          settings: content of ``tokenizer_config.json``.

        Returns:
          The template, the one named "default" of several; None where there is none.

        Raises:
          ValueError: several without a default; files that are damaged.
        """
        source: Any = settings.get("chat_template")
        if present(folder / OLD_FILE):
            source = read_json(folder / OLD_FILE).get("chat_template", source)
        if present(folder / FILE):
            source = _read_file(folder / FILE)
        if isinstance(source, list):
            entries = [entry for entry in source if isinstance(entry, Mapping)]
            named = {entry.get("name"): entry.get("template") for entry in entries}
            source = named.get("default")
            if source is None:
                raise ValueError(
                    f"{folder}: none of the chat templates {list(named)} is 'default'; give one "
                    "that name in tokenizer_config.json, or leave chat_template out there"
                )
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(
                f"{folder}: chat_template is a {type(source).__name__}, no template; fetch its "
                "tokenizer_config.json again"
            )
        texts = {
            name: value.get("content") if isinstance(value, Mapping) else value
            for name, value in settings.items()
            if name.endswith("_token")
        }
        return cls(source, {name: text for name, text in texts.items() if isinstance(text, str)})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final: bool = False,
        **variables: Any,
    ) -> str:
        """Return a conversation as the text that the model was trained on.

        Args:
          messages: each with ``role`` and ``content``.
          add_generation_prompt: whether the answer's beginning follows.
          continue_final: whether the text ends within the last message, for the model to go on.
          **variables: what else the template reads, such as ``tools`` or ``enable_thinking``.

        Raises:
          ValueError: the template is none, or refuses the conversation; jinja2 is missing.
        """
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise ValueError(
                "a chat template needs jinja2: pip install 'wush-jax[hub]', or give the text as it "
                "is"
            ) from error
        values = {"tools": None, "documents": None, **self.tokens, **variables}
        chat = [dict(message) for message in messages]
        try:
            if continue_final:
                chat[-1]["content"] += CUT
            template = _environment().from_string(self.source)
            text = template.render(
                messages=chat, add_generation_prompt=add_generation_prompt, **values
            )
            return _up_to_cut(text) if continue_final else text
        # What a template computes may fail in any of Python's ways.
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refuses the conversation ({error})") from error


def _up_to_cut(text: str) -> str:
    """Return a text up to the mark; where the template strips messages, so is what is left."""
    before, found, after = text.rpartition(CUT.strip())
    if not found:
        raise ValueError("it drops the end of the last message")
    return before if after.startswith(" ") else before.rstrip()


def _read_file(file: Path) -> str:
    check_inside(file)
    try:
        if file.stat().st_size > JSON_BYTES:
            raise ValueError(f"{file} is huge for a template; fetch it again")
        return file.read_text("utf8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 ({error.reason}); fetch it again") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); fetch it again") from error


def _environment() -> Any:
    """Return what transformers gives to templates, and nothing else."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %}``: what the model wrote; to us its text."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
