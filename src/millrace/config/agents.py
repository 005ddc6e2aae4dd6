"""The settings of agents that `millrace train` trains through the gateway."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from millrace.config.base import Model
from millrace.config.tasks import CodeConfig, CodePath, CommandPart, FilePath, from_text

if TYPE_CHECKING:
    from millrace.config.models import RunConfig

Bytes = Annotated[int, Field(ge=2**24)]
# What every agent gets from Millrace; `environment` and `pass_environment` can't name these.
OWN_VARIABLES = (
    "HOME", "TMPDIR", "MILLRACE_PROMPT", "OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL",
    "ANTHROPIC_API_KEY",
)  # fmt: skip


class AgentLimitsConfig(Model):
    """Limits on one agent's processes. None is no limit."""

    memory: Bytes | None = None
    """Memory of each process in bytes: what it has allocated (RLIMIT_DATA). More is refused to it."""
    processes: PositiveInt | None = None
    """Number of processes that an agent may have at a time. An agent with more is ended."""


class AgentConfig(Model):
    """An agent that talks to the gateway (docs/tasks.md): a command for each sample, or a Python function.
    `file.py:name` is short for path and name."""

    command: Annotated[tuple[CommandPart, ...], Field(min_length=1)] | None = None
    """The command, such as `[python, agent.py]`. Files are looked for beside the config first. `python` is the
    trainer's own."""
    path: CodePath | None = None
    """A Python file or module with the function, as in `reward`, in place of a command."""
    name: str | None = None
    """Name of the function."""
    reward: Literal["exit", "file", "return", "functions"] | None = None
    """Where the reward comes from: `exit` is 1 if the command ends with status 0, and 0 otherwise; `file` is
    `reward.json` in the command's folder; `return` is what the function returns; `functions` are those of `reward:`.
    None is `functions` if `reward:` is set, and otherwise `exit` for a command and `return` for a function."""
    timeout: PositiveFloat | None = None
    """Seconds for the agent. One that takes longer is ended, which counts as its failure. None leaves
    `rollout.sample_timeout`, at which the sample is left out."""
    grace: PositiveFloat = 2.0
    """Seconds that a command has to clean up after it gets SIGTERM, when it is late or given up. Then it is killed."""
    concurrency: PositiveInt = 64
    """Number of agents that run at once."""
    files: tuple[FilePath, ...] = ()
    """Files and folders, beside the config or in the current folder, that are copied to each command's folder."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the command."""
    pass_environment: tuple[str, ...] = ()
    """Names of the trainer's environment variables that the command gets, too. It gets no others but PATH and LANG."""
    limits: AgentLimitsConfig = AgentLimitsConfig()
    """Limits on the command's processes."""
    keep: Literal["all", "failed", "none"] = "failed"
    """Which folders of commands are kept: all, those of agents and samples that failed, or none."""
    runner: CodeConfig | None = None
    """A class or function without arguments that makes a `millrace.agents.AgentRunner`, which runs commands elsewhere
    than in processes of this host: in containers, for example."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return from_text(value)

    @field_validator("command", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("a command is a list of its words, such as [python, agent.py]")
        return value

    @property
    def title(self) -> str:
        """The agent in messages."""
        return " ".join(self.command) if self.command is not None else f"{self.path}:{self.name}"

    def rewarded(self, *, functions: bool) -> "AgentConfig":
        """Return the settings with the kind of the reward. functions: whether `reward:` names functions."""
        default = "functions" if functions else "exit" if self.command is not None else "return"
        return self.model_copy(update={"reward": self.reward or default})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.command is None) == (self.path is None) or (self.path is None) != (self.name is None):
            raise ValueError("an agent has either a command, or path and name of a function")
        for_commands = ("grace", "files", "environment", "pass_environment", "limits", "keep", "runner")
        if self.command is None and (given := [name for name in for_commands if _differs(self, name)]):
            raise ValueError(f"{given[0]} is for an agent with a command, and this one is a function")
        if self.reward in (("return",) if self.command is not None else ("exit", "file")):
            kinds = "exit, file or functions" if self.command is not None else "return or functions"
            raise ValueError(f"the reward of this agent can't be {self.reward!r}; it is {kinds}")
        for name in (*self.environment, *self.pass_environment):
            if name in OWN_VARIABLES:
                raise ValueError(f"the environment variable {name} is set by Millrace; leave it out")
        return self


OF_THE_ROLLOUT = ("temperature", "top_p", "top_k", "max_turn_tokens", "retries", "folder")  # settings of the gateway
IN_PLACE_OF = {
    "environment": "an agent plays with what it likes",
    "judges": "the agent's reward is that of `agent.reward`",
    "rollout.tools": "the agent has its own tools",
    "rollout.partial_rollouts": "the gateway keeps the tokens of a request whose engine fails; it must be true",
    "gateway.temperature": "rollout.temperature says it",
    "gateway.top_p": "rollout.top_p says it",
    "gateway.top_k": "rollout.top_k says it",
    "gateway.max_turn_tokens": "rollout.max_turn_tokens says it",
    "gateway.retries": "rollout.sample_retries says it",
    "gateway.folder": "the episodes of a run end with it, and are in samples/",
}


def check_agent(run: "RunConfig") -> None:
    """Raise ValueError if the settings of a run do not go together with its agent."""
    agent, gateway = run.agent, run.gateway
    if agent is None:
        if gateway is not None:
            raise ValueError("gateway is for an agent, and there is none; set agent, or leave it out")
        return
    if agent.timeout is not None and agent.timeout > run.rollout.sample_timeout:
        raise ValueError(
            f"agent.timeout is {agent.timeout:g} s, but rollout.sample_timeout ends a sample after "
            f"{run.rollout.sample_timeout:g} s; raise it"
        )
    settings = {
        "environment": run.environment,
        "judges": run.judges,
        "rollout.tools": run.rollout.tools,
        "rollout.partial_rollouts": not run.rollout.partial_rollouts,
        **{f"gateway.{name}": gateway and _differs(gateway, name) for name in OF_THE_ROLLOUT},
    }
    for name, value in settings.items():
        if value:
            raise ValueError(f"{name} can't be set together with agent: {IN_PLACE_OF[name]}; leave one of them out")
    if run.reward is not None and agent.reward not in (None, "functions"):
        raise ValueError(f"agent.reward is {agent.reward}, so `reward:` has no meaning; leave one of them out")


def _differs(section: Model, name: str) -> bool:
    """Return whether a setting has another value than its default."""
    return bool(getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True))
