"""The format of models that the package `renderers` knows, for those whose turns no chat template describes.

gpt-oss writes several messages in one turn, Kimi K2 its own ids of calls, and DeepSeek V4 has no template. `renderers`
has a class for each such family.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from tokenizers.decoders import DecodeStream

from millrace.errors import ConfigError, DataError
from millrace.gateway.call import Tool, ToolUse, TurnText, parsed
from millrace.imports import needs_extra
from millrace.rollout.chat import load_tokenizer
from millrace.rollout.sample import Message, images_in, text_of


class RenderersFormat:
    """The format by one renderer. tokenizer: the model's, of transformers. renderer: of the package."""

    def __init__(self, tokenizer: Any, renderer: Any) -> None:
        self._tokenizer, self._renderer = tokenizer, renderer
        self.stop_token_ids: tuple[int, ...] = tuple(renderer.get_stop_token_ids())

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[int, ...]:
        """As TurnFormat."""
        try:
            made = self._renderer.render_ids(
                _written(messages), tools=_specs(tools) or None, add_generation_prompt=True
            )
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise DataError(f"the renderer refuses them: {error}") from error
        return tuple(made)

    def bridge(
        self,
        token_ids: Sequence[int],
        turn: Message,  # noqa: ARG002
        added: Sequence[Message],
        tools: Sequence[Tool],
    ) -> tuple[int, ...] | None:
        """As TurnFormat."""
        before = list(token_ids)
        try:
            made = self._renderer.bridge_to_next_turn(
                before[:-1], before[-1:], _written(added), tools=_specs(tools) or None
            )
        except (ValueError, TypeError, KeyError, AssertionError):  # it takes no messages of the assistant
            return None
        if made is None or made.token_ids[: len(before)] != before:
            return None
        return tuple(made.token_ids[len(before) :])

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """As TurnFormat."""
        stream = DecodeStream(skip_special_tokens=False)

        def decode(token_ids: Sequence[int]) -> str:
            steps = (stream.step(self._tokenizer.backend_tokenizer, token) for token in token_ids)
            return "".join(step for step in steps if step)

        return decode

    def read(self, text: str, tools: Sequence[Tool], *, ended: bool = True) -> TurnText:
        """As TurnFormat. Nothing is certain before the turn has ended."""
        if not ended:
            return TurnText("", "")
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        made = self._renderer.parse_response(list(ids), tools=_specs(tools) or None)
        bad = next((call for call in made.tool_calls if call.status != "ok"), None)
        calls = tuple(
            ToolUse(str(call.id or ""), str(call.name), _text(call.arguments))
            for call in made.tool_calls
            if call.status == "ok" and tools
        )
        content = made.content if bad is None else "\n".join(filter(None, (made.content.strip(), bad.raw)))
        malformed = None if bad is None else f"the renderer could not read the call ({bad.status})"
        return TurnText((made.reasoning_content or "").strip(), content.strip(), calls, malformed)

    def unreasoned(self) -> str:
        """As TurnFormat. A renderer does not tell."""
        return ""

    def forced(self, name: str | None) -> str | None:  # noqa: ARG002
        """As TurnFormat. Renderers have no text that begins a call."""
        return None

    def encode(self, text: str) -> tuple[int, ...]:
        """As TurnFormat."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def has_placeholder(self, token_ids: Sequence[int]) -> bool:  # noqa: ARG002
        """As TurnFormat. It takes no images."""
        return False


def load_renderers_format(path: str, name: str, template_kwargs: Mapping[str, object] | None = None) -> RenderersFormat:
    """Load the format of a model folder or Hub name by a renderer.

    name: of the renderer, such as `gpt-oss`; `auto` finds it by the name of the model.

    Raises ConfigError if `renderers` is not installed, knows no renderer of this name, or none for this model.
    """
    with needs_extra("gateway.format renderers"):
        import httpx  # noqa: F401 (renderers imports it and does not name it)
        import renderers
    tokenizer = load_tokenizer(path)
    try:
        made = renderers.create_renderer(
            tokenizer, renderers.config_from_name(name), chat_template_kwargs=template_kwargs or None
        )
    except (ValueError, KeyError, AssertionError, OSError) as error:
        raise ConfigError(f"gateway.format: renderers has none for {name} and {path}: {error}") from error
    if isinstance(made, renderers.DefaultRenderer):
        raise ConfigError(
            f"gateway.format: renderers does not know the model {path}; name its renderer, as in `renderers:gpt-oss`, "
            "or use `template`"
        )
    return RenderersFormat(tokenizer, made)


def _written(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as renderers takes them."""
    written = []
    for message in messages:
        one = {key: value for key, value in message.items() if key not in ("reasoning", "tool_calls")}
        if images_in([message]):
            raise DataError("images need gateway.format: template")
        one["content"] = text_of(message.get("content") or "")
        if message.get("reasoning"):
            one["reasoning_content"] = message["reasoning"]
        calls = message.get("tool_calls")
        if isinstance(calls, list | tuple):
            one["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": parsed(call["function"]["arguments"])}}
                for call in calls
            ]
        written.append(one)
    return written


def _specs(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [dict(tool["function"]) for tool in tools]  # type: ignore[call-overload]


def _text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
