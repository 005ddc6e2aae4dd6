"""Generation for TRL's `GRPOTrainer` on a fleet, in the place of TRL's own client of a vLLM server."""

import itertools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from accelerate.utils import broadcast_object_list
from trl import GRPOTrainer

from millrace.errors import ArgumentError, ConfigError, MillraceError, PublishError
from millrace.fleet.client import FleetClient
from millrace.integrations.trl.passes import shorten_passes
from millrace.integrations.trl.requests import Batch, Sender, room, sampling_params
from millrace.integrations.trl.weights import check_publishable, shards, whole_weights
from millrace.sync import Fleet, Follower
from millrace.types import GenerateRequest, Generation
from millrace.weights.sharded import follow, leading

logger = logging.getLogger(__name__)


def use_fleet(
    trainer: GRPOTrainer,
    fleet: Fleet | Follower,
    *,
    deadline: float = 600.0,
    retries: int = 3,
    tokens_per_pass: int | None = None,
) -> None:
    """Make a trainer generate on a fleet.

    Before the first generation of each step, the trainer's weights are published to the fleet. TRL's own tools and
    environments work as with a vLLM server. TRL corrects its loss by the engine's logprobs
    (`vllm_importance_sampling_correction`). Call this once, after the trainer's constructor.

    Args:
        trainer: Constructed without `use_vllm`. It must train a text model.
        fleet: The fleet. It must stay open while the trainer generates. With several ranks, `fleet_of_ranks` opens it.
        deadline: Seconds for one completion, retries included.
        retries: How many engine failures one completion survives. It keeps its tokens.
        tokens_per_pass: If given, the trainer's model computes samples of similar length together, about this many
            tokens in a pass. Otherwise it computes TRL's batch, which is padded to its longest sample. Loss and
            gradients are the same but for rounding. With several ranks, passes have as many samples as in TRL.

    Raises:
        ConfigError: A setting of the trainer can't be honoured on a fleet. The message names it.
        ArgumentError: An argument has the wrong type.

    Example:

        trainer = GRPOTrainer(model=MODEL, reward_funcs=reward, train_dataset=dataset, args=config)
        with open_fleet({"kind": "vllm", "replicas": 2}, MODEL, log_dir="logs") as fleet:
            use_fleet(trainer, fleet)
            trainer.train()
    """
    if not isinstance(trainer, GRPOTrainer):
        raise ArgumentError(f"trainer must be TRL's GRPOTrainer, and is a {type(trainer).__name__}")
    _require_fleet(fleet, main=trainer.accelerator.is_main_process)
    _require_served(trainer)
    trainer.vllm_generation = FleetGeneration(trainer, fleet, Sender(deadline, retries))
    trainer.use_vllm, trainer.vllm_mode = True, "server"
    trainer._last_loaded_step = -1  # so the first generation publishes, also after a checkpoint was loaded
    if tokens_per_pass is not None:
        shorten_passes(trainer, tokens_per_pass)


class FleetGeneration:
    """What a `GRPOTrainer` calls to generate: TRL's `VLLMGeneration`, on a fleet. Made by `use_fleet`.

    `fleet`: the fleet. `sender`: how requests are sent to it. `version`: the weight version of the last publish; None
    before it.
    """

    def __init__(self, trainer: GRPOTrainer, fleet: Fleet | Follower, sender: Sender) -> None:
        self.fleet, self.sender = fleet, sender
        self.version: int | None = None
        self._trainer = trainer
        self._calls = itertools.count()

    def sync_weights(self) -> None:
        """Publish the trainer's weights. All ranks call this together. Raises PublishError if no engine takes them."""
        error: Exception | None = None
        version, told = None, ""
        try:
            version = self._publish()
        except MillraceError as caught:
            error, told = caught, str(caught)
        if self._trainer.accelerator.num_processes > 1:  # all ranks continue with it, or none
            version, told = broadcast_object_list([version, told])
        if told:
            raise error or PublishError(f"rank 0: {told}")
        self.version = version

    def _publish(self) -> int | None:
        """Publish, or on other ranks than 0 take part in gathering the weights. Return the version on rank 0."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        sharded = shards(model)
        if not isinstance(self.fleet, Fleet):
            if sharded is not None:
                follow(sharded)
            return None
        step = self._trainer.state.global_step
        whole = nullcontext(lambda: whole_weights(model))
        source = whole if sharded is None else leading(sharded, self.fleet.dtypes)
        with source as given:
            report = self.fleet.publish(given, label=step)
        for name, error in report.failed.items():
            logger.warning("%s did not take the weights of step %d: %s", name, step, error)
        return report.version

    def batch(self, size: int, per_prompt: int) -> Batch:
        """Return a new batch of `size` completions, `per_prompt` in a row for each prompt."""
        name = f"{self._trainer.accelerator.process_index}.{next(self._calls)}"
        return Batch(name, self._trainer.state.global_step, size, per_prompt, self.version)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[object] | None,
        num_generations: int,
        profiler: AbstractContextManager[object] | None = None,
    ) -> tuple[Sequence[Sequence[int]], list[list[int]], list[list[list[float]]], None]:
        """Generate one completion for each prompt.

        Args:
            prompts: [N][T] token ids. Each prompt occurs `num_generations` times in a row.
            images: Must be None.
            num_generations: The completions per prompt.
            profiler: TRL's timer of the call.

        Returns:
            The prompts, the completions as [N][T] token ids, their logprobs as [N][T][1], and None.

        Raises:
            ConfigError: There are images.
            RolloutError: A completion could not be generated. The message names it.
        """
        if images is not None and any(images):
            raise ConfigError("images can't be sent to a fleet; train on text")
        trainer, batch = self._trainer, self.batch(len(prompts), num_generations)
        stops, context_length = tuple(trainer.eos_token_ids), self.fleet.context_length

        async def every(fleet: FleetClient) -> list[Generation]:
            async def make(index: int) -> Generation:
                prompt = tuple(prompts[index])
                sampling = sampling_params(
                    trainer, room(len(prompt), trainer.max_completion_length, context_length), stops
                )
                return await self.sender.send(fleet, GenerateRequest(prompt, sampling), batch.routing(index))

            return await batch.all(make)

        with profiler or nullcontext():
            made = self.fleet.run(every)
        return (
            prompts,
            [list(generation.output_ids) for generation in made],
            [[[logprob] for logprob in generation.logprobs.tolist()] for generation in made],
            None,
        )


def _require_fleet(fleet: object, *, main: bool) -> None:
    """Raise ArgumentError if a rank's fleet is not the fleet of rank 0."""
    if not isinstance(fleet, Fleet | Follower):
        raise ArgumentError(f"fleet must be one of millrace.sync.open_fleet, and is a {type(fleet).__name__}")
    if isinstance(fleet, Fleet) is not main:
        wrong = "rank 0 follows a fleet, and can't publish" if main else "a rank other than 0 has a fleet of its own"
        raise ArgumentError(f"{wrong}; open the fleet with fleet_of_ranks, which all ranks share")


def _require_served(trainer: GRPOTrainer) -> None:
    """Raise ConfigError if a fleet can't do what a setting of the trainer asks for."""
    args, sharding = trainer.args, trainer._dist
    adapted = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    refused = {
        "use_vllm": (args.use_vllm, "construct the trainer without it; the fleet takes the place of TRL's vLLM"),
        "processing_class": (trainer._is_vlm, "it is a processor of images; pass a tokenizer, and train on text"),
        "generation_kwargs": (
            args.generation_kwargs,
            "engines get the sampling settings beside it only",
        ),
        "vllm_structured_outputs_regex": (args.vllm_structured_outputs_regex, "a fleet has no structured outputs"),
        "sharding": (sharding.is_zero3 or sharding.fsdp_version == 1, "its weights can be gathered with FSDP 2 only"),
        "peft_config": (adapted and sharding.is_fsdp, "an adapter of a model that is sharded can't be merged"),
    }
    for name, (found, reason) in refused.items():
        if found:
            raise ConfigError(f"the trainer can't generate on a fleet because of its {name}: {reason}")
    if trainer.loss_type == "vespo" and trainer.vllm_importance_sampling_mode.startswith("sequence"):
        raise ConfigError("loss_type vespo needs vllm_importance_sampling_mode token_truncate or token_mask")
    sampling_params(trainer, 1, ())
    check_publishable(trainer.accelerator.unwrap_model(trainer.model))
