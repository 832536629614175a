"""Effect of each setting on the facts task: curvature and damping, projection and codec, layers, loss, number of pairs.

Unfolded float16 rows of the job (dim 64) hold most variants at once: a codec is applied to them as extraction applies it,
layers are slices, curvature acts on the pairs. Other dims are extracted anew. AUROC of right above wrong statements, preference
weights, clean pairs and 40 % of them swapped (mean of 100 draws).

    python -m benchmarks.quality.ablations --seeds 3 --json build/quality/ablations.json

Shapes: N candidates, Q pairs, L layers, P projected dims a side, M = L·P², D folded dims.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import job
from benchmarks.quality import figure, harness
from benchmarks.quality.facts import make_data, more_pairs
from benchmarks.quality.harness import Extracted, Float64
from prism_job import projection
from prism_job.score import curvature
from prism_job.storage import model_files
from prism_job.storage.address import open_store
from prism_job.store import codec

Float32 = NDArray[np.float32]
DAMPINGS = (0.001, 0.01, 0.1, 1.0, 10.0)
SIGN_DIMS = (16_384, 65_536, 262_144)
OTHER_DIMS = (16,)
NUM_PAIRS = (4, 8, 16, 32, 64, 128)
NUM_FIRST = 60
"""Pairs of `make_data`, used by every variant but the number of pairs."""
DRAWS = 100
DEFAULT_DAMPING = 0.1


def main() -> None:
    options = harness.parser(__doc__, seeds=3).parse_args()
    default = f"curvature: K-FAC, damping {DEFAULT_DAMPING:g}"
    by_seed = [one_seed(options.work, options.model, seed) for seed in range(options.seeds)]
    names = list(dict.fromkeys(name.rpartition("[")[0] for name in by_seed[0]))
    for figures in by_seed:
        for name in names:
            for share in ("clean", "swapped"):
                figures[f"{name} over default[{share}]"] = figures[f"{name}[{share}]"] - figures[f"{default}[{share}]"]
    found = harness.over_seeds(by_seed)
    columns = [f"{what}[{share}]" for share in ("clean", "swapped") for what in ("", " over default")]
    lines = [[name, *(found[f"{name}{column}"] for column in columns)] for name in names]
    over = "less the default, within a seed"
    print(harness.table(["variant", "clean pairs", over, "40 % swapped", over], lines))
    job.write_json(options.json, {"seeds": options.seeds, **harness.flat(found)})
    shares = {"clean": "clean pairs", "swapped": "40 % swapped"}
    series = {name: [found[f"pairs: {count}[{share}]"] for count in NUM_PAIRS] for share, name in shares.items()}
    figure.lines(options.figure, "How many pairs", ("target pairs", "AUROC"), NUM_PAIRS, series)


def one_seed(work: Path, model: str, seed: int) -> dict[str, float]:
    settings = [seed, model_files.identify(model), harness.constants(__name__)]
    return harness.once(work / "ablations" / f"{seed}.json", settings, lambda: measure(work, model, seed))


def extracted(work: Path, model: str, seed: int, dim: int) -> tuple[Extracted, np.ndarray]:
    """Unfolded rows of the facts task at this dim, with 128 pairs, and which rows are right."""
    candidates, targets = make_data(seed)
    targets = [*targets, *more_pairs(seed, max(NUM_PAIRS) - len(targets))]
    options = {"projection": {"dim": dim}, "codec": {"kind": "float16"}}
    run = harness.extract(work, f"facts-{seed}-p{dim}", candidates, targets, model=model, extraction=options)
    return run, np.array([row["label"] == 1 for row in candidates])


def measure(work: Path, model: str, seed: int) -> dict[str, float]:
    run, good_N = extracted(work, model, seed, 64)
    rows_NM, norm_N, tokens_N = candidate_rows(run), run.norm_N, run.column("tokens")
    pairs_QM, pi_Q, layers = run.pair_rows_QM, run.targets.preference_Q, run.targets.layers
    figures: dict[str, float] = {}

    def add(name: str, scores_NQ: Float64) -> None:
        for share, value in by_share(scores_NQ[:, :NUM_FIRST], pi_Q[:NUM_FIRST], good_N, seed).items():
            figures[f"{name}[{share}]"] = value

    kfac = {damping: solved(run, pairs_QM, damping) for damping in DAMPINGS}
    add("curvature: none", inner(rows_NM, pairs_QM))
    for damping, solved_QM in kfac.items():
        add(f"curvature: K-FAC, damping {damping:g}", inner(rows_NM, solved_QM))
    for damping in DAMPINGS:
        add(f"curvature: EK-FAC, damping {damping:g}", inner(rows_NM, solved_ekfac(run, pairs_QM, rows_NM, damping)))
    best_QM = kfac[DEFAULT_DAMPING]
    plain_NQ = inner(rows_NM, best_QM)
    add("rows: p=64 float16, unfolded", plain_NQ)
    for dims in SIGN_DIMS:
        as_sign = folded_scores(rows_NM, best_QM, layers, dims, lambda rows: codec.decode_sign(codec.encode_sign(rows)))
        add(f"rows: p=64 sign {dims:,}", as_sign)
    add("rows: p=64 folded to 65,536, float32", folded_scores(rows_NM, best_QM, layers, 65_536, lambda rows: rows))
    add("loss: token sum", plain_NQ)
    add("loss: token mean", plain_NQ / tokens_N[:, None])
    add("score: cosine", plain_NQ / norm_N[:, None])
    for name, wanted in layer_parts(layers).items():
        mask_M = np.repeat([wanted(place, layer) for place, layer in enumerate(layers)], 64 * 64)
        add(f"layers: {name}", inner(rows_NM[:, mask_M], best_QM[:, mask_M]))
    for count in NUM_PAIRS:
        for share, value in by_number(plain_NQ, pi_Q, good_N, count, seed).items():
            figures[f"pairs: {count}[{share}]"] = value
    del rows_NM
    for dim in OTHER_DIMS:
        other, _ = extracted(work, model, seed, dim)
        solved_QM = solved(other, other.pair_rows_QM, DEFAULT_DAMPING)
        add(f"rows: p={dim} float16, unfolded", inner(candidate_rows(other), solved_QM))
    return figures


def candidate_rows(run: Extracted) -> Float32:
    return np.concatenate([codec.decode_float16(arrays) for arrays in run.candidate_arrays()])


def inner(rows_NM: Float32, pairs_QM: Float32) -> Float64:
    return (rows_NM @ pairs_QM.astype(np.float32).T).astype(np.float64)


def solved(run: Extracted, pairs_QM: Float32, damping: float) -> Float32:
    """(H + λI)⁻¹ of each pair under K-FAC: what the reducer does to their weighted sum, one pair at a time."""
    factors, bases = eigenbases(run)
    lam = curvature.damping_value(factors, damping)
    return divided(pairs_QM, bases, [np.outer(beta, alpha) + lam for alpha, _, beta, _ in bases])


def solved_ekfac(run: Extracted, pairs_QM: Float32, rows_NM: Float32, damping: float) -> Float32:
    """The same with K-FAC's eigenvalues corrected (George et al. 2018): second moments of the candidates' own gradients in the
    eigenbases, a token; λ in units of their mean."""
    factors, bases = eigenbases(run)
    dim, second_LPP = factors.inputs_LPP.shape[1], np.empty_like(factors.inputs_LPP)
    for layer, (_, basis_a, _, basis_b) in enumerate(bases):
        block = rows_NM[:, layer * dim**2 : (layer + 1) * dim**2].reshape(-1, dim, dim)
        sides = basis_b.astype(np.float32), block, basis_a.astype(np.float32)
        rotated = np.einsum("ji,njk,kl->nil", *sides, optimize=True)
        second_LPP[layer] = (rotated.astype(np.float64) ** 2).sum(0) / factors.num_tokens
    lam = damping * float(second_LPP.mean())
    return divided(pairs_QM, bases, [second_PP + lam for second_PP in second_LPP])


def eigenbases(run: Extracted) -> tuple[curvature.Factors, list[tuple[Float64, Float64, Float64, Float64]]]:
    """K-FAC's factors, and of each layer the eigenvalues and eigenvectors of inputs and of output gradients."""
    dim = run.run.spec.extraction.projection.dim
    factors, bases = curvature.merge_factors(run.plan, open_store(run.run.spec.store), run.targets.layers, dim), []
    for inputs_PP, outputs_PP in zip(factors.inputs_LPP, factors.outputs_LPP, strict=True):
        (alpha, basis_a), (beta, basis_b) = (
            np.linalg.eigh(side / factors.num_tokens) for side in (inputs_PP, outputs_PP)
        )
        bases.append((np.clip(alpha, 0, None), basis_a, np.clip(beta, 0, None), basis_b))
    return factors, bases


def divided(pairs_QM: Float32, bases: list[Any], divisors_LPP: list[Float64]) -> Float32:
    """Each pair's row, divided by these numbers in the eigenbases."""
    found_QM = np.empty_like(pairs_QM)
    for layer, ((_, basis_a, _, basis_b), divisor_PP) in enumerate(zip(bases, divisors_LPP, strict=True)):
        dim = len(basis_a)
        part = slice(layer * dim**2, (layer + 1) * dim**2)
        block = pairs_QM[:, part].reshape(-1, dim, dim).astype(np.float64)
        rotated = (basis_b.T @ block @ basis_a) / divisor_PP
        found_QM[:, part] = (basis_b @ rotated @ basis_a.T).reshape(len(block), -1)
    return found_QM


def folded_scores(
    rows_NM: Float32, pairs_QM: Float32, layers: list[str], dims: int, store: Callable[[Float32], Float32]
) -> Float64:
    """Scores of rows folded to `dims` and stored in some form, against the folded pairs."""

    rows_ND, pairs_QD = (
        np.stack([projection.fold(row.reshape(len(layers), -1), layers, 0, dims) for row in rows]).astype(np.float32)
        for rows in (rows_NM, pairs_QM)
    )
    return inner(store(rows_ND), pairs_QD)


def layer_parts(layers: list[str]) -> dict[str, Callable[[int, str], bool]]:
    third = len(layers) / 3
    return {
        "attention": lambda place, name: "self_attn" in name,
        "MLP": lambda place, name: "mlp" in name,
        "first third": lambda place, name: place < third,
        "middle third": lambda place, name: third <= place < 2 * third,
        "last third": lambda place, name: place >= 2 * third,
    }


def by_share(scores_NQ: Float64, pi_Q: Float64, good_N: np.ndarray, seed: int) -> dict[str, float]:
    """AUROC under preference weights with clean pairs, and with 40 % of them swapped."""
    generator = np.random.default_rng(seed)
    swapped = []
    for _ in range(DRAWS):
        swapped_Q = harness.draw_swapped(generator, len(pi_Q), 0.4)
        sign_Q, weight_Q = harness.flipped(pi_Q, swapped_Q)
        swapped.append(harness.area(scores_NQ @ (sign_Q * weight_Q), good_N))
    return {"clean": harness.area(scores_NQ @ pi_Q, good_N), "swapped": float(np.mean(swapped))}


def by_number(scores_NQ: Float64, pi_Q: Float64, good_N: np.ndarray, count: int, seed: int) -> dict[str, float]:
    """The same with so many pairs, drawn among all."""
    generator = np.random.default_rng(seed)
    sums: dict[str, Any] = {"clean": [], "swapped": []}
    for _ in range(DRAWS):
        drawn_Q = generator.permutation(len(pi_Q))[:count]
        swapped_Q = np.arange(count) < round(0.4 * count)
        for share, flips_Q in (("clean", np.zeros(count, np.bool_)), ("swapped", swapped_Q)):
            sign_Q, weight_Q = harness.flipped(pi_Q[drawn_Q], flips_Q)
            sums[share].append(harness.area(scores_NQ[:, drawn_Q] @ (sign_Q * weight_Q), good_N))
    return {share: float(np.mean(values)) for share, values in sums.items()}


if __name__ == "__main__":
    main()
