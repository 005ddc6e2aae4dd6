"""The settings of the agent gateway."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from millrace.config.base import Model
from millrace.config.paths import LocalPath


class GatewayConfig(Model):
    """The HTTP gateway through which agents speak OpenAI's and Anthropic's protocols with the fleet."""

    host: str = "127.0.0.1"
    """Address that the gateway listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port that the gateway listens on. 0 picks a free port."""
    model: str = "policy"
    """Name of the model in answers and in `/v1/models`. Agents may ask for any name."""
    format: str = "template"
    """How conversations become tokens and turns become text: `template` follows the model's chat template, `renderers`
    is the package of this name (`millrace[renderers]`), and `package.module:name` is a function of your own."""
    drift: Literal["append", "template", "strict"] = "append"
    """What happens if the chat template would write earlier turns in another way now. `append` keeps the tokens as they
    were sampled, `template` starts a branch with the tokens that the template writes, `strict` refuses the request."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """Sampling temperature of all requests. None takes what the agent asks for, or 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling of all requests. None takes what the agent asks for, or 1."""
    top_k: int | None = None
    """Tokens to sample from in all requests. None takes what the agent asks for, or all (-1)."""
    max_turn_tokens: PositiveInt | None = None
    """Most output tokens of one request. None is the rest of the context."""
    timeout: PositiveFloat = 3600.0
    """Seconds for one request."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How many failures of engines one request survives. The agent sees only a pause."""
    folder: LocalPath | None = None
    """Folder in which episodes are kept, so that they go on after a restart. None keeps them in memory."""
