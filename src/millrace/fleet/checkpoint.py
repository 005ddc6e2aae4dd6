"""What a trainer publishes, in the form that the engines load: a checkpoint of the model's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.errors import DataError, PublishError
from millrace.fleet.lora import read_lora
from millrace.fleet.origin import Origin
from millrace.model_config import read_quantization
from millrace.types import LoraConfig
from millrace.weights.audit import Samples
from millrace.weights.cast import Dtypes, cast, dtypes_of
from millrace.weights.source import WeightSource, source_of
from millrace.weights.transports.base import PublishTarget

if TYPE_CHECKING:
    import torch

    from millrace.weights.trained import Trained


class Checkpoint:
    """Makes a checkpoint of the engines' model. origin: the weights of their start; None until they are known."""

    def __init__(self) -> None:
        self.origin: Origin | None = None
        self._trained: Trained | None = None  # read when the first version is published

    def whole(
        self,
        given: WeightSource,
        engines: Sequence[PublishTarget],
        *,
        require_finite: bool,
        samples: Samples | None,
    ) -> WeightSource:
        """Return the tensors with the checkpoint's names, in the engines' dtypes, quantised where the folder is.

        samples: keeps elements of them before they are quantised.

        Raises PublishError if the trainer's tensors are not the model's, or not finite.
        """
        from millrace.weights.finite import only_finite  # imports torch
        from millrace.weights.quantised import as_in_folder
        from millrace.weights.trained import read_trained

        try:
            if self._trained is None:
                self._trained = read_trained(self._folder(engines))
            dtypes = self._dtypes(engines)
            source = self._trained.tensors(given)
            if require_finite:
                source = only_finite(source, dtypes)
            if samples is not None:
                quantization = read_quantization(self._folder(engines))
                source = as_in_folder(source, self._trained.stored, quantization, samples)
            return cast(source, dtypes)
        except DataError as error:
            raise PublishError(str(error)) from error

    def lora(
        self, source: WeightSource, engines: Sequence[PublishTarget], *, config: LoraConfig, require_finite: bool
    ) -> "dict[str, torch.Tensor]":
        """Return the adapter's tensors, by name.

        Raises PublishError if they don't fit the engines' weights, or are not finite.
        """
        tensors = read_lora(source, config, engines, self._folder(engines))
        if require_finite:
            from millrace.weights.finite import only_finite  # imports torch

            only_finite(source_of(tensors.items()), self._dtypes(engines))
        return tensors

    def _dtypes(self, engines: Sequence[PublishTarget]) -> Dtypes:
        if self.origin is not None:
            return self.origin.dtypes
        return dtypes_of(engines[0].info, self._folder(engines))

    def _folder(self, engines: Sequence[PublishTarget]) -> Path:
        """Return the folder of the engines' model, which may not exist on this host."""
        return self.origin.folder if self.origin is not None else Path(engines[0].info.model_path)
