"""Whole conversations for TRL's `GRPOTrainer`: a `rollout_func` in which each sample goes at its own pace."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from millrace.errors import ConfigError
from millrace.fleet.client import FleetClient
from millrace.integrations.trl.conversation import Conversations, PlayedConversation, ToolCode
from millrace.integrations.trl.generation import FleetGeneration


class FleetRollout:
    """A `rollout_func` for `GRPOTrainer` that plays conversations with tools on the trainer's fleet.

    No sample waits for another one: its tool is called, and its next turn begins, as soon as its turn has ended. In
    TRL's own tool loop, each turn waits for the slowest sample. Later turns are appended to the tokens of the earlier
    ones, which stay as they were sampled. Tokens of tool answers are masked from the loss.

    Reward functions also get `messages`, the chat messages after the prompt, and `episode_end`, one of the values of
    `millrace.rollout.EpisodeEnd`.

    Args:
        tokenizer: The model's tokenizer, with its chat template. Prompts must be lists of chat messages.
        tools: What the model may call: functions with type hints and a docstring as for TRL's `tools`, or subclasses of
            `millrace.rollout.Tool`, of which each conversation gets an instance.
        max_turns: The turns of the model in one conversation.
        max_turn_tokens: The output tokens of one turn. By default only the trainer's `max_completion_length` limits
            it, which is for all tokens after the prompt, tool answers included.
        tool_timeout: Seconds for one tool call, by default 30 or the tool's own `timeout`. If the call takes longer or
            raises, the model reads that as the answer.

    Raises:
        DataError: Turns can't be appended in the chat template, or it writes tool calls in an unknown form.
        ConfigError: A tool can't be used.

    Example:

        rollout = FleetRollout(tokenizer, tools=[search], max_turns=6)
        trainer = GRPOTrainer(MODEL, reward, args=config, train_dataset=dataset, rollout_func=rollout)
        use_fleet(trainer, fleet)
        trainer.train()
    """

    __name__ = "FleetRollout"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[ToolCode],
        *,
        max_turns: int = 8,
        max_turn_tokens: int | None = None,
        tool_timeout: float | None = None,
    ) -> None:
        self._conversations = Conversations.of(tokenizer, tools, max_turns, max_turn_tokens, tool_timeout)

    def __call__(self, prompts: Sequence[object], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """Play one conversation for each prompt. Called by the trainer.

        Returns:
            `prompt_ids`, `completion_ids` and `env_mask` as [N][T] integers, `logprobs` as [N][T] (0 where `env_mask`
            is 0), `messages` and `episode_end`.

        Raises:
            ConfigError: The trainer has no fleet, or tools of its own.
            RolloutError: A conversation could not be played. The message names it.
        """
        generation = getattr(trainer, "vllm_generation", None)
        if not isinstance(generation, FleetGeneration):
            raise ConfigError("the trainer has no fleet; call use_fleet(trainer, fleet) before trainer.train()")
        if trainer.tools:
            raise ConfigError("pass the tools to FleetRollout, and not to the trainer, which would call them again")
        per_prompt = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        batch = generation.batch(len(prompts), per_prompt)

        async def every(fleet: FleetClient) -> list[PlayedConversation]:
            async def make(index: int) -> PlayedConversation:
                return await self._conversations.play(
                    fleet, generation.sender, f"{batch.name}-{index}", prompts[index], batch.routing(index), trainer
                )

            return await batch.all(make)

        played = generation.fleet.run(every)
        parts = [(one.episode, one.prompt_tokens) for one in played]
        return {
            "prompt_ids": [list(episode.token_ids[:start]) for episode, start in parts],
            "completion_ids": [list(episode.token_ids[start:]) for episode, start in parts],
            "logprobs": [episode.logprobs[start:].tolist() for episode, start in parts],
            "env_mask": [episode.loss_mask[start:].astype(int).tolist() for episode, start in parts],
            "messages": [one.messages for one in played],
            "episode_end": [str(episode.end) for episode, _ in parts],
        }
