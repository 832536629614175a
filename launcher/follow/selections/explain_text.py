"""What `prism explain` prints for a person: each example with the pairs that its score comes from, or a pair's examples."""

from typing import Any

from launcher.follow.terminal_text import one_line

MAX_CHARACTERS = 300
"""Of a text on the screen; -o json has all of it."""

Facts = dict[str, Any]


def explain_text(facts: Facts) -> str:
    """The contributions that add up to each score; or, with --pair, the examples at both ends of one pair's contributions."""
    return "\n".join(_pair_lines(facts) if "for" in facts else _example_lines(facts))


def _example_lines(facts: Facts) -> list[str]:
    pairs = {it["pair"]: it for it in facts["pairs"]}
    lines = []
    for example in facts["examples"]:
        state = "selected" if example["selected"] else "not selected"
        lines += [f"score {example['score']:.5g}  {state}  {_named(example)}", f"  {_short(example['text'])}"]
        for of_set in example.get("sets", []):
            lines.append(f"  {_share(of_set['contribution'], example['score'])}  set {one_line(of_set['set'])}")
        for each in example["pairs"]:
            lines.append(
                f"  {_share(each['contribution'], example['score'])}  {_pair_named(pairs[each['pair']])}: "
                f"{_short(pairs[each['pair']]['text'])}"
            )
        if example["others"]["pairs"]:
            others = f"the other {example['others']['pairs']:,} pairs together"
            lines.append(f"  {_share(example['others']['contribution'], example['score'])}  {others}")
        lines.append("")
    return [*lines, "A contribution is part of the score; its percentage is of the score."]


def _pair_lines(facts: Facts) -> list[str]:
    lines = [_pair_named(facts["pair"]), f"  {_short(facts['pair']['text'])}"]
    for end, head in (("for", "raises the score of"), ("against", "lowers the score of")):
        if facts[end]:
            lines += ["", f"{head} (contribution, score, example):"]
        for it in facts[end]:
            lines.append(f"  {it['contribution']:>11.4g}  {it['score']:>11.4g}  {_named(it)}")
            lines.append(f"  {'':>11}  {_short(it['text'])}")
    return lines


def _share(contribution: float, score: float) -> str:
    share = f"{contribution / score:+.1%}" if score else "–"
    return f"{contribution:>+11.4g} {share:>8}"


def _pair_named(pair: Facts) -> str:
    of_set = f" of set {one_line(pair['set'])}" if "set" in pair else ""
    preference = "" if pair["preference"] is None else f", π {pair['preference']:.2f}"
    return f"pair {pair['pair']}{of_set}{preference}"


def _named(example: Facts) -> str:
    return f"{example['example_id']}  {one_line(example['source'])}:{example['line']}"


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
