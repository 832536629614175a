"""What the other examples of a micro-batch change in a row: the same texts alone and together.

Rounding depends on the shape of a batch. In a mixture of experts it can make another expert win a near-tie of the router, and
then a whole token takes another path. Measured in bfloat16, in bfloat16 with routers in float32, and in float32.

    python -m benchmarks.quality.batch_mates --model build/quality/upcycled/moe --json build/quality/batch_mates.json

Shapes: B examples of a batch, T tokens, K chosen experts, N examples, D dims of a row.
"""

import torch
from torch import Tensor

from benchmarks import job
from benchmarks.quality.facts import make_data
from prism_job.data import examples
from prism_job.extract import tokenise
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.extract.tokenise import Encoded
from prism_job.spec.model import ModelSpec

CPU = torch.device("cpu")
VARIANTS = {"bfloat16": False, "bfloat16, routers in float32": True, "float32": False}


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of a model with routers, or a dense one to compare with")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = load_tokenizer(ModelSpec(uri=options.model))
    contents = [examples.candidate_content(row) for row in make_data(0)[0][: options.examples]]
    texts = [tokenise.encode_candidate(content, tokenizer, 2048) for content in contents]
    figures: dict[str, float] = {"examples": len(texts), "tokens_per_batch": options.tokens_per_batch}
    exact_ND = None
    print(f"{'':<30}{'cosine: mean':>13}{'worst':>9}{'examples':>10}{'choices':>9}{'with float32':>14}")
    for name, routers in reversed(VARIANTS.items()):
        alone_ND, chosen_alone = rows_of(options.model, name, routers, texts, [[n] for n in range(len(texts))])
        lengths = [len(text.ids) for text in texts]
        batches = list(tokenise.micro_batches(lengths, options.tokens_per_batch))
        together_ND, chosen = rows_of(options.model, name, routers, texts, batches)
        exact_ND = alone_ND if exact_ND is None else exact_ND
        cosine_N = torch.cosine_similarity(alone_ND, together_ND)
        flips_N = torch.tensor([(a != b).any(-1).sum() for a, b in zip(chosen_alone, chosen, strict=True)])
        num_choices = sum(one[..., 0].numel() for one in chosen)
        found = {
            "cosine_mean": cosine_N.mean(),
            "cosine_worst": cosine_N.min(),
            "examples_flipped": (flips_N > 0).float().mean(),
            "choices_flipped": flips_N.sum() / max(1, num_choices),
            "cosine_with_float32": torch.cosine_similarity(together_ND, exact_ND).mean(),
        }
        figures |= {f"{key}[{name}]": float(value) for key, value in found.items()}
        mean, worst, some, share, exact = (float(value) for value in found.values())
        print(f"{name:<30}{mean:>13.6f}{worst:>9.4f}{some:>10.1%}{share:>9.3%}{exact:>14.6f}", flush=True)
    job.write_json(options.json, figures)


def rows_of(
    uri: str, variant: str, routers_in_float32: bool, texts: list[Encoded], batches: list[list[int]]
) -> tuple[Tensor, list[Tensor]]:
    """The row of each text, [N, D], and its experts, [layers, tokens, K] in ascending order."""
    model = load_model(ModelSpec(uri=uri, dtype=variant.partition(",")[0]), CPU)
    chosen: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].sort(-1).values))
        if routers_in_float32 and type(module).__name__.endswith("Router"):
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    capture = GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(64, 0, 65536)])
    rows_ND, experts = torch.zeros(len(texts), 65536), [torch.empty(0)] * len(texts)
    for places in batches:
        chosen.clear()
        batch = tokenise.collate([texts[place] for place in places], CPU)
        rows_ND[places] = capture.gradients_of(batch, mean=False)[0].rows_BD
        for position, place in enumerate(places):
            num_tokens = len(texts[place].ids)
            by_layer = [each.view(*batch.ids_BT.shape, -1)[position, :num_tokens] for each in chosen]
            experts[place] = torch.stack(by_layer) if by_layer else torch.empty(0, 0, 0)
    return rows_ND, experts


if __name__ == "__main__":
    main()
