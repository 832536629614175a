"""Laws of preference π and of the pairs' contributions, against a slow reference.

Shapes: Q target pairs, D dims, T response tokens.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_job.extract.capture.gradients import GradientCapture
from prism_job.extract.capture.layers import captured_layers
from prism_job.extract.capture.row_format import RowFormat
from prism_job.extract.tokenise import collate, encode_candidate
from prism_job.score.preference import preference
from prism_job.score.targets import contributions
from tests.models import build_model, build_tokenizer


def preference_by_hand(chosen_nll_T: list[float], rejected_nll_T: list[float]) -> float:
    """Equations 1 and 2 as they stand: products of token probabilities, roots, a quotient; in 50 digits."""
    with localcontext() as context:
        context.prec = 50

        def likelihood(nll_T: list[float]) -> Decimal:
            product = Decimal(1)
            for nll in nll_T:
                product *= (-Decimal(nll)).exp()
            return product ** (Decimal(1) / len(nll_T))

        chosen, rejected = likelihood(chosen_nll_T), likelihood(rejected_nll_T)
        return float(chosen / (chosen + rejected))


def test_preferences_are_those_of_the_paper() -> None:
    random = np.random.default_rng(0)
    for chosen_length, rejected_length in ((1, 1), (3, 40), (100, 7)):
        chosen, rejected = random.exponential(3, chosen_length), random.exponential(3, rejected_length)
        found = preference(np.array([chosen.mean()]), np.array([rejected.mean()]))
        wanted = preference_by_hand(chosen.tolist(), rejected.tolist())
        # The mean of float64 NLLs: 1e-16 an operation.
        assert found[0] == pytest.approx(wanted, rel=1e-13)


def test_responses_of_thousands_of_tokens_do_not_underflow() -> None:
    random = np.random.default_rng(1)
    chosen, rejected = random.uniform(10, 20, 2000), random.uniform(10, 20.5, 2000)
    assert chosen.sum() > 20_000
    assert math.exp(-chosen.sum()) == 0  # what a naive p(y) comes to
    with np.errstate(all="raise"):
        found = preference(np.array([chosen.sum() / 2000]), np.array([rejected.sum() / 2000]))
    wanted = preference_by_hand(chosen.tolist(), rejected.tolist())
    assert found[0] == pytest.approx(wanted, rel=1e-12)  # a few roundings of 1e-16
    assert 0.4 < found[0] < 0.8


nlls = st.floats(0, 1e5)


@settings(deadline=None, derandomize=True)
@given(nlls, nlls)
def test_the_preferences_for_either_response_add_up_to_one(chosen: float, rejected: float) -> None:
    pair = np.array([chosen, rejected])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = preference(pair, pair[::-1])
    assert abs(found.sum() - 1) <= 2**-52  # each is rounded once or twice
    assert (found >= 0).all()
    assert (found[0] > 0.5) <= (chosen < rejected)
    assert preference(pair, pair).tolist() == [0.5, 0.5]


def test_only_response_tokens_count_in_a_preference() -> None:
    model, tokenizer = build_model("llama", torch.float64, seed=2), build_tokenizer()
    capture = GradientCapture(model, captured_layers(model, ("*",)), [RowFormat(4, 0, None)])
    prompt, chosen, rejected = "What is the capital of Norway? ", "Oslo, of course.", "Rome"
    sides = [
        encode_candidate({"prompt": prompt, "completion": response}, tokenizer, 200) for response in (chosen, rejected)
    ]
    (rows,) = capture.gradients_of(collate(sides, torch.device("cpu")), mean=True)
    mean_nll = (rows.nll_B / rows.tokens_B).numpy()
    found = preference(mean_nll[:1], mean_nll[1:])[0]

    def response_nlls(response: str) -> list[float]:
        ids = [*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]
        num_prompt = len(tokenizer(prompt).input_ids)
        assert tokenizer.decode(ids[:num_prompt]) == prompt  # no token stands across the seam
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        return [-float(log_p[place - 1, ids[place]]) for place in range(num_prompt, len(ids))]

    # The model's own rounding, float64.
    assert found == pytest.approx(preference_by_hand(response_nlls(chosen), response_nlls(rejected)), rel=1e-9)
    assert abs(found - 0.5) > 0.01


def test_contributions_are_shares_of_the_directions_square() -> None:
    random = np.random.default_rng(3)
    pairs_QD, weight_Q = random.standard_normal((5, 30)) + 0.5, random.uniform(0, 1, 5)
    direction_D = weight_Q @ pairs_QD
    found = contributions(weight_Q * (pairs_QD @ direction_D))
    assert found.sum() == pytest.approx(1, rel=1e-12)
    for pair in range(5):
        wanted = weight_Q[pair] * sum(pairs_QD[pair] * direction_D) / sum(direction_D**2)
        assert found[pair] == pytest.approx(wanted, rel=1e-12)
    assert contributions(np.zeros(3)).tolist() == [0, 0, 0]
