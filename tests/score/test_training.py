"""A score predicts how the preferences move when a tiny model trains on the candidate for one small step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prism_job import projection
from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.tokenise import Encoded, collate
from prism_job.score.preference import preference
from prism_job.score.scorers import finish, scorer
from prism_job.store import codec
from tests.models import VOCAB, build_model
from tests.oracle import linear_layers, plain_loss, weight_gradients


@cache
def tiny_model() -> Any:
    return build_model("llama", torch.float64, seed=4)


def made_up_response(random: np.random.Generator, prompt: list[int], length: int) -> Encoded:
    ids = [*prompt, *random.integers(3, 60, length).tolist()]
    return Encoded(ids, [place >= len(prompt) for place in range(len(ids))])


@cache
def made_up_pairs() -> list[tuple[Encoded, Encoded]]:
    """Six pairs, each with a shared prompt and responses of unlike length."""
    random = np.random.default_rng(21)
    prompts = [random.integers(3, 60, 4).tolist() for _ in range(6)]
    return [(made_up_response(random, prompt, 5), made_up_response(random, prompt, 8)) for prompt in prompts]


@cache
def made_up_candidates() -> list[Encoded]:
    random = np.random.default_rng(22)
    return [
        made_up_response(random, random.integers(3, VOCAB, 3).tolist(), int(random.integers(4, 16))) for _ in range(40)
    ]


def preferences() -> np.ndarray:
    """π_q of the model as it stands."""
    with torch.no_grad():
        chosen, rejected = (
            np.array([plain_loss(tiny_model(), pair[side], mean=True)[0].item() for pair in made_up_pairs()])
            for side in (0, 1)
        )
    return preference(chosen, rejected)


def log_odds(preference_Q: np.ndarray) -> np.ndarray:
    return np.log(preference_Q / (1 - preference_Q))


@contextmanager
def stepped(step: dict[str, Tensor]) -> Iterator[None]:
    """The model with `step` added to its weights, for a while."""
    layers = linear_layers(tiny_model())
    before = {name: module.weight.detach().clone() for name, module in layers.items()}
    for name, change in step.items():
        layers[name].weight.data += change
    try:
        yield
    finally:
        for name, module in layers.items():
            module.weight.data.copy_(before[name])


def gradient_of(place: int) -> dict[str, Tensor]:
    return weight_gradients(tiny_model(), made_up_candidates()[place], mean=False)[0]


def preference_after(size: float, step: dict[str, Tensor]) -> float:
    """Mean of π after a step of this size against `step`."""
    with stepped(times(-size / norm_of(step), step)):
        return float(preferences().mean())


def times(factor: float, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: factor * gradient for name, gradient in gradients.items()}


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(torch.cat([gradient.reshape(-1) for gradient in gradients.values()]).norm())


def summed(gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(one[name] for one in gradients) for name in gradients[0]}


@cache
def weighted_direction() -> dict[str, Tensor]:
    """g = 1/|Q| Σ π_q (ḡ⁺ − ḡ⁻) in the space of the weights, by autograd."""
    parts = []
    for weight, (chosen, rejected) in zip(preferences(), made_up_pairs(), strict=True):
        for side, sign in ((chosen, 1), (rejected, -1)):
            gradients, _, _ = weight_gradients(tiny_model(), side, mean=True)
            parts.append(times(sign * float(weight) / len(made_up_pairs()), gradients))
    return summed(parts)


def extracted_scores(dim: int, fold_dims: int | None, *, exact: bool = False) -> np.ndarray:
    """Scores of the candidates as the job computes them: capture, codec, weights, direction, scorer; no curvature.

    exact: the projection is replaced by the identity, so that rows are whole gradients.
    """
    model = tiny_model()
    layers = captured_layers(model, ("*",))
    unfolded = GradientCapture(model, layers, [RowFormat(dim, 0, None)])
    folded = GradientCapture(model, layers, [RowFormat(dim, 0, fold_dims)])
    if exact:
        for projections in (*unfolded.projections, *folded.projections):
            projections.scale = 1.0
            for name, sides in projections.sides.items():
                eyes = [torch.eye(side.shape[0], dim, dtype=side.dtype) for side in sides]
                projections.sides[name] = (eyes[0], eyes[1])
    cpu = torch.device("cpu")
    chosen, rejected = (
        unfolded.gradients_of(collate([pair[side] for pair in made_up_pairs()], cpu), mean=True)[0] for side in (0, 1)
    )
    (rows,) = folded.gradients_of(collate(made_up_candidates(), cpu), mean=False)
    weight_Q = preference(*((side.nll_B / side.tokens_B).numpy() for side in (chosen, rejected)))
    direction = weight_Q @ (chosen.rows_BD - rejected.rows_BD).numpy() / len(weight_Q)
    if exact:
        return rows.rows_BD.numpy() @ direction
    if fold_dims:
        direction = projection.fold(direction.reshape(len(layers.names), -1), layers.names, 0, fold_dims)
    kind = "sign" if fold_dims else "float16"
    raw = scorer(kind, direction)(codec.encode(kind, rows.rows_BD.float().numpy()))
    return finish(raw, rows.tokens_B.numpy(), rows.norm_B.float().numpy(), "influence", "sum")


def test_a_score_is_the_slope_of_the_weighted_log_odds_along_training() -> None:
    scores, weight_Q = extracted_scores(48, None, exact=True), preferences()
    assert len({*np.sign(scores)}) == 2
    for place, score in enumerate(scores):
        gradient = gradient_of(place)
        size = 1e-5 / norm_of(gradient)
        sides = []
        for sign in (-1, 1):
            with stepped(times(-sign * size, gradient)):  # training goes against the gradient
                sides.append((weight_Q * log_odds(preferences())).mean())
        slope = (sides[1] - sides[0]) / (2 * size)
        # Central differences: the square of the step, and 1e-15 over 1e-5 by rounding: 2e-11 seen of the largest score.
        assert abs(slope - score) < 1e-9 * norm_of(gradient) * norm_of(weighted_direction())


@pytest.mark.parametrize(("dim", "fold_dims"), [(16, None), (16, 2048)], ids=["float16", "sign"])
def test_training_on_the_highest_scored_raises_the_preference_and_on_the_lowest_lowers_it(
    dim: int, fold_dims: int | None
) -> None:
    ranked = np.argsort(extracted_scores(dim, fold_dims))
    before = preferences().mean()
    for places, sign in ((ranked[-5:], 1), (ranked[:5], -1)):
        training = summed([gradient_of(place) for place in places])
        assert sign * (preference_after(0.02, training) - before) > 1e-4


def test_no_random_step_raises_the_preference_like_the_one_against_the_direction() -> None:
    direction, before = weighted_direction(), preferences().mean()
    size = 0.05
    gained = preference_after(size, direction) - before
    assert gained > 0 > preference_after(-size, direction) - before
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        random = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in direction.items()}
        # 15,360 dims: a random direction has a cosine of about 0.008 with the best one.
        assert abs(preference_after(size, random) - before) < 0.2 * gained
