"""One micro-batch through the model, or its halves where it does not fit into memory. Does not know units, shards or ranks."""

import sys
from dataclasses import dataclass, fields

import torch

from prism_job.errors import TransientError
from prism_job.extract import tokenise
from prism_job.extract.capture.gradients import GradientBatch, GradientCapture, LossCapture
from prism_job.extract.capture.sketches import FactorSums
from prism_job.progress import event


class PassTooLarge(TransientError):
    """A micro-batch of several texts does not fit into memory, and its rank cannot halve it without the others."""


@dataclass(frozen=True)
class Computed:
    """The gradients of a micro-batch, by row format.

    `too_large`: positions of examples that do not fit into memory alone; their rows are zero, their token counts 0.
    """

    gradients: list[GradientBatch]
    too_large: list[int]


class Passes:
    """Computes micro-batches with one capture, and remembers what does not fit into memory.

    `can_halve`: no other rank must make the same passes.
    """

    def __init__(
        self, capture: GradientCapture | LossCapture, *, can_halve: bool, max_tokens: int = sys.maxsize
    ) -> None:
        self.capture, self.can_halve = capture, can_halve
        self.max_tokens = max_tokens  # micro-batches of more tokens are halved at once: such a one did not fit before

    def compute(self, examples: list[tokenise.Encoded], *, mean: bool, factors: FactorSums | None = None) -> Computed:
        """The gradients of a micro-batch; for `mean` and `factors` see `GradientCapture.gradients_of`.

        Raises PassTooLarge: it does not fit into memory and cannot be halved here. TransientError: one text does not fit.
        """
        num_tokens = len(examples) * max(len(example.ids) for example in examples)
        if len(examples) == 1 or num_tokens <= self.max_tokens:
            gradients = self._gradients_if_they_fit(examples, num_tokens, mean, factors)
            if gradients is not None:
                return Computed(gradients, [])
            if len(examples) == 1:
                return Computed(self._zero_rows(), [0])
        middle = len(examples) // 2
        halves = (examples[:middle], examples[middle:])
        first, second = (self.compute(half, mean=mean, factors=factors) for half in halves)
        gradients = [_concatenated(*pair) for pair in zip(first.gradients, second.gradients, strict=True)]
        return Computed(gradients, [*first.too_large, *(middle + position for position in second.too_large)])

    def _gradients_if_they_fit(
        self, examples: list[tokenise.Encoded], num_tokens: int, mean: bool, factors: FactorSums | None
    ) -> list[GradientBatch] | None:
        try:
            return self.capture.gradients_of(
                tokenise.collate(examples, self.capture.device), mean=mean, factors=factors
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.can_halve:
                what = f"out of memory in a pass of {num_tokens} tokens"
                raise self._too_large(what, len(examples), num_tokens) from error
        # Not before this line: the error's traceback holds the tensors of the failed pass, so none would be freed.
        torch.cuda.empty_cache()
        if self.max_tokens == sys.maxsize:
            event("memory", tokens=num_tokens, note="out of memory: passes of this size are halved from here on")
        self.max_tokens = max(1, num_tokens // 2)
        return None

    def _too_large(self, what: str, num_examples: int, num_tokens: int) -> TransientError:
        fix = "free memory, or lower extraction.maxLength: one text is a pass"
        if num_examples > 1:
            fix = f"set extraction.tokensPerBatch below {num_tokens}: under ZeRO-3 a pass cannot be split on one rank"
        fix += "; or switch the audit off (audit: {examples: 0})" if len(self.capture.row_formats) > 1 else ""
        return (PassTooLarge if num_examples > 1 else TransientError)(what, where="extract", fix=fix)

    def _zero_rows(self) -> list[GradientBatch]:
        zero = torch.zeros(1, device=self.capture.device)
        widths, device = self.capture.widths, self.capture.device
        return [GradientBatch(torch.zeros(1, width, device=device), zero, zero.int(), zero) for width in widths]


def is_out_of_memory(error: BaseException) -> bool:
    """Also of a library's workspace on the GPU (CUBLAS_STATUS_ALLOC_FAILED), which torch raises as a RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "_STATUS_ALLOC_FAILED"))


def _concatenated(first: GradientBatch, second: GradientBatch) -> GradientBatch:
    names = [each.name for each in fields(GradientBatch)]
    return GradientBatch(*(torch.cat([getattr(first, name), getattr(second, name)]) for name in names))
