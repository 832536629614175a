"""Compares the rows of every causal-LM architecture of transformers with autograd, and writes docs/models.md.

Each architecture is a tiny model with random weights (tiny_architectures.py). Its rows come from one batch of texts of several
lengths. The oracle takes one text alone, asks autograd for the gradient of each captured weight, and projects it.

    python -m benchmarks.models.architectures --json architectures.json

Shapes: B examples, P projected dims a side, D dims of an unfolded row, L captured weights, M = P² numbers of one of them.
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import job
from benchmarks.models import tiny_architectures
from benchmarks.models.tiny_architectures import KINDS, MODEL_TYPES, NOT_BUILT, VOCAB
from prism_job import projection
from prism_job.errors import RequestError
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import Layers, captured_layers
from prism_job.extract.capture.probe import used_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.tokenise import Encoded, collate
from tests.oracle import plain_loss, rademacher

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
DIM, SEED = 6, 3
LENGTHS = (14, 9, 5, 11)
"""Tokens of the examples: the longest has no padding in their batch, and a batch is not as wide as it is high."""

ROW_TOLERANCE, BATCH_TOLERANCE = 2e-6, 2e-5
"""float32 rounds at 6e-8 an operation; a token, expert or layer that is missing is an error of order one."""
TRANSPOSED = ("Llama4TextExperts",)
"""Experts outside transformers' interface whose matrices stand as [inputs, outputs]."""
WHOLE = 0.995
"""A share of the matrix weights from which on the table speaks of the whole model."""


@dataclass(frozen=True)
class Verdict:
    """What the table says of one architecture."""

    model_type: str
    kind: str
    attention: str
    weights: int = 0  # captured
    coverage: float = 0.0  # of what the globs ask for
    share: float = 0.0  # of the model's matrix weights but embeddings and head
    row_error: float = float("nan")
    float32_error: float = float("nan")
    batch_error: float = float("nan")
    not_captured: str = ""  # the largest of these weights
    refused: str = ""
    failed: str = ""  # neither right nor refused: a defect
    seconds: float = 0.0

    @property
    def text(self) -> str:
        if self.failed or self.refused:
            return f"**fails**: {self.failed}" if self.failed else f"refused: {self.refused}"
        works = "works" if self.attention == "sdpa" else "works with `attention: eager`"
        return (
            works
            if self.share >= WHOLE
            else f"{works}, {self.share:.1%} of the model; not captured: `{self.not_captured}`"
        )

    @property
    def line(self) -> str:
        errors = f"float64 {self.row_error:.1e}, float32 {self.float32_error:.1e}, batch-mates {self.batch_error:.1e}"
        return f"{self.model_type}: {self.text} ({self.weights} weights, {errors}, {self.seconds:.1f} s)"


class EverythingInFloat64(TorchFunctionMode):
    """Makes float64 of every float32 that a model asks for: norms, softmaxes and routers compute in float32 by name."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        named = {name: _widened(value) for name, value in (named or {}).items()}
        return function(*map(_widened, arguments), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with EverythingInFloat64():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def examples() -> list[Encoded]:
    """Random texts; loss falls on their second halves."""
    random = np.random.default_rng(1)
    texts = [random.integers(5, VOCAB, length).tolist() for length in LENGTHS]
    return [Encoded(ids, [index >= len(ids) // 2 for index in range(len(ids))]) for ids in texts]


def judge(model_type: str) -> Verdict:
    """Builds one architecture and compares every row. Whatever it raises becomes its verdict."""
    started = time.monotonic()
    try:
        model, attention = tiny_architectures.build(model_type)
    except Exception as error:
        return Verdict(model_type, KINDS[0], "", failed=f"cannot be built: {short(error)}")
    kind = tiny_architectures.kind_of(model_type, model)
    figures: dict[str, Any] = {}
    try:
        figures = compare(model)
        if not (figures["row_error"] <= ROW_TOLERANCE and figures["float32_error"] <= ROW_TOLERANCE):
            figures["failed"] = (
                f"rows differ from autograd by {figures['row_error']:.1e}, {figures['float32_error']:.1e}"
            )
        elif not figures["batch_error"] <= BATCH_TOLERANCE:
            figures["failed"] = f"batch-mates change a row by {figures['batch_error']:.1e}"
    except RequestError as error:
        figures["refused"] = short(error.what)
    except Exception as error:
        figures["failed"] = f"{type(error).__name__}: {short(error)}"
    return Verdict(model_type, kind, attention, **figures, seconds=time.monotonic() - started)


def compare(model: Any) -> dict[str, Any]:
    """The figures of a Verdict. Raises RequestError where the model is refused."""
    encoded = examples()
    layers = used_layers(model, captured_layers(model, ("*",)))
    batch_BD = rows(model, layers, [encoded])
    alone_BD = rows(model, layers, [[example] for example in encoded])
    plain_BD = torch.stack([oracle(model, layers.names, example) for example in encoded]).float()
    with in_float64():
        model = model.double()
        found_BD = rows(model, layers, [encoded])
        wanted_BD = torch.stack([oracle(model, layers.names, example) for example in encoded])
    return {
        "weights": len(layers.names),
        "coverage": layers.coverage,
        "share": layers.share_of_model,
        "not_captured": max(layers.unseen, key=layers.unseen.__getitem__, default=""),
        "row_error": row_error(found_BD, wanted_BD),
        "float32_error": relative_error(alone_BD, plain_BD),
        "batch_error": relative_error(batch_BD, alone_BD),
    }


def rows(model: Any, layers: Layers, batches: Sequence[Sequence[Encoded]]) -> Tensor:
    """[B, D], unfolded, as extraction makes them."""
    capture = GradientCapture(model, layers, [RowFormat(DIM, SEED, None)])
    batch_rows = [capture.gradients_of(collate(list(batch), torch.device("cpu")), mean=False)[0] for batch in batches]
    return torch.cat([each.rows_BD for each in batch_rows])


def relative_error(found_BD: Tensor, wanted_BD: Tensor) -> float:
    return float(((found_BD - wanted_BD).norm(dim=1) / wanted_BD.norm(dim=1)).max())


def row_error(found_BD: Tensor, wanted_BD: Tensor) -> float:
    """The largest over examples and weights, relative to that weight's own part of the row (at least 1e-3 of the whole)."""
    parts_BL = (found_BD - wanted_BD).unflatten(1, (-1, DIM**2)).norm(dim=2)
    whole_B1 = wanted_BD.norm(dim=1, keepdim=True)
    return float((parts_BL / wanted_BD.unflatten(1, (-1, DIM**2)).norm(dim=2).maximum(whole_B1 * 1e-3)).max())


def oracle(model: Any, names: Sequence[str], example: Encoded) -> Tensor:
    """[D]: the projected gradients of one example's loss, by autograd."""
    parameters = [parameter_of(model, name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        loss, _, _ = plain_loss(model, example, mean=False)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    finally:
        model.requires_grad_(False)
    return torch.cat([sketch(model, name, gradient) for name, gradient in zip(names, gradients, strict=True)])


def sketch(model: nn.Module, name: str, gradient: Tensor) -> Tensor:
    """[M]: P_bᵀ G P_a, of experts Σ_e diag(σ_e) P_bᵀ G_e P_a."""
    owner = model.get_submodule(name.rpartition(".")[0]) if gradient.ndim == 3 else model.get_submodule(name)
    if isinstance(owner, Conv1D) or getattr(owner, "is_transposed", type(owner).__name__ in TRANSPOSED):
        gradient = gradient.transpose(-1, -2)
    outputs, inputs = gradient.shape[-2:]
    gradient = gradient.double()
    side_a = torch.from_numpy(rademacher(SEED, name, "a", inputs, DIM)).double()
    side_b = torch.from_numpy(rademacher(SEED, name, "b", outputs, DIM)).double()
    if gradient.ndim == 2:
        return (side_b.T @ gradient @ side_a).flatten()
    signs = torch.from_numpy(projection.signs(SEED, name, "e", gradient.shape[0], DIM)).double()
    return torch.einsum("eoi,ep,op,iq->pq", gradient, signs, side_b, side_a).flatten()


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """A captured weight is named like its module, or like the parameter itself."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    return found if isinstance(found, nn.Parameter) else found.weight


def short(error: object) -> str:
    return " ".join(str(error).split())[:220].replace("|", "/")


def document(verdicts: Sequence[Verdict]) -> str:
    """docs/models.md."""
    parts = [INTRODUCTION.format(version=transformers.__version__, torch=torch.__version__, summary=summary(verdicts))]
    for kind in KINDS:
        parts.append(
            f"## {kind[0].upper()}{kind[1:]}\n\n| architecture | verdict | weights | share | float64 | float32 | batch-mates |"
        )
        parts.append("|---|---|---|---|---|---|---|")
        for each in verdicts:
            if each.kind == kind:
                row = [f"`{each.model_type}`", each.text]
                judged = not each.refused and each.weights
                row += [str(each.weights), f"{each.share:.3f}"] if judged else ["", ""]
                errors = (each.row_error, each.float32_error, each.batch_error)
                row += [f"{error:.0e}" for error in errors] if judged else ["", "", ""]
                parts.append(f"| {' | '.join(row)} |")
        parts.append("")
    parts.append("## Not tried\n")
    parts += [f"- `{name}`: {reason}." for name, reason in NOT_BUILT.items()]
    return "\n".join(parts) + "\n"


def summary(verdicts: Sequence[Verdict]) -> str:
    refused = sum(bool(each.refused) for each in verdicts)
    failed = sum(bool(each.failed) for each in verdicts)
    whole = sum(each.share >= WHOLE and not each.refused and not each.failed for each in verdicts)
    partly = len(verdicts) - refused - failed - whole
    return (
        f"{len(verdicts)} architectures: {whole} captured whole, {partly} in part, {refused} refused, {failed} failing"
    )


INTRODUCTION = """# Models

Which architectures of transformers {version} can be used. `benchmarks/models/architectures.py` writes this page
(torch {torch}):

```bash
python -m benchmarks.models.architectures --json architectures.json
```

{summary}.

Each architecture is a tiny model with random weights: widths of 64, two to four layers so that each kind of layer
occurs, four experts. The name is `model_type` in `config.json`.

- **weights**: how many are captured. **share**: of all matrix weights but embeddings and head. Convolutions and
  routers weigh more in a tiny model than in a published one.
- **float64**: the largest relative error of any weight's part of any row, against autograd on one text alone, both in
  float64. **float32**: the largest relative error of a whole row, both in float32. An architecture fails over
  {row_tolerance}.
- **batch-mates**: the largest relative change of a row by texts of other lengths in its batch, float32. It fails over
  {batch_tolerance}.

Sparse attention with an indexer (DeepSeek-V3.2, GLM with DSA) chooses past tokens by a score, through which no gradient
goes: the indexer's weights are not captured. Where scores are exactly equal, padding may change the choice.
""".replace("{row_tolerance}", f"{ROW_TOLERANCE:.0e}").replace("{batch_tolerance}", f"{BATCH_TOLERANCE:.0e}")


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("model_types", nargs="*", help="only these, without writing the document")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = []
    for model_type in chosen.model_types or MODEL_TYPES:
        verdicts.append(judge(model_type))
        print(verdicts[-1].line, flush=True)
    print(summary(verdicts))
    if not chosen.model_types:
        DOCUMENT.write_text(document(verdicts), encoding="utf-8")
    names = ("text", "share", "row_error", "float32_error", "batch_error")
    job.write_json(
        chosen.json, {f"{each.model_type}.{name}": getattr(each, name) for each in verdicts for name in names}
    )
    sys.exit(any(each.failed for each in verdicts))


if __name__ == "__main__":
    main()
