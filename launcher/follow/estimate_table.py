"""What `prism estimate` prints for a person. Does not know how the figures are computed."""

from typing import Any

from launcher.follow.terminal_text import aligned, one_line, printable

TERMS = ("weights", "gathered", "activations", "logits", "captured", "projections", "rows", "workspace", "buffers")

_MAKE_ROOM = dict.fromkeys(TERMS, "lower extraction.maxLength, or choose a larger GPU") | {
    "weights": "quantise to fewer bits, leave model.quantization out to share them between GPUs, or choose a larger GPU",
    "gathered": "choose a larger GPU",
}
"""By the largest term."""


def estimate_table(facts: dict[str, Any]) -> str:
    """Model, data, cost and store, one line each; memory per rank, term by term, unless one GPU holds all; the topology."""
    scaled = "" if facts["tokens_are_exact"] else f" (scaled: one row in {facts['sample']} was tokenised)"
    flops = facts["flops"]
    lines = [
        f"model     {printable(facts['model'])}, {facts['quantization'] or facts['dtype']}: "
        f"{facts['parameters']:,} parameters; a token uses {facts['parameters_active']:,}",
        "capture   hidden states of the last layer; each pass is forward only"
        if facts["forward_only"]
        else f"capture   {facts['parameters_covered']:,} parameters in {facts['layers_captured']} layers: "
        f"{facts['coverage']:.1%} of those asked for, {facts['share_of_model']:.1%} of all matrices but embeddings and head",
        f"data      {facts['num_examples']:,} examples and {facts['num_pairs']:,} pairs in {facts['units']:,} units, "
        f"{facts['bad_rows']:,} unusable rows{scaled if facts['bad_rows'] else ''}",
        *_bad_row_lines(facts),
        *_cut_row_lines(facts, scaled),
        f"tokens    {facts['tokens']:,}{scaled}; {facts['tokens_padded']:,} with padding; "
        f"{facts['tokens_of_audit']:,} of them for the audit",
        f"work      {flops['total']:.3g} FLOPs: forward {flops['forward']:.3g}, backward {flops['backward']:.3g}, "
        f"projection {flops['projection']:.3g}, sketches {flops['sketches']:.3g}",
        f"store     {facts['store_bytes']:,} bytes, from an empty store: "
        + ", ".join(f"{name.replace('_', ' ')} {size_text(size)}" for name, size in facts["store"].items()),
        f"time      {duration_text(facts['gpu_hours'])} on one {facts['gpu']} at {facts['utilisation']:.0%} of its published "
        "peak",
        *([] if facts.get("price") is None else [f"price     {facts['price']:,.2f}, by spec.gpuHourPrice"]),
        *_preference_lines(facts),
        "",
        *([] if _fits_one_gpu(facts) else [*aligned(_memory_rows(facts["memory"]), right=True), ""]),
        _topology_text(facts),
    ]
    return "\n".join(lines)


def _cut_row_lines(facts: dict[str, Any], scaled: str) -> list[str]:
    if not facts["cut_rows"] and not facts["cut_pairs"]:
        return []
    return [f"          cut at maxLength: {facts['cut_rows']:,} examples and {facts['cut_pairs']:,} pairs{scaled}"]


def _preference_lines(facts: dict[str, Any]) -> list[str]:
    """The preference model, which is loaded and freed before the reference."""
    it = facts.get("preference_model")
    if it is None:
        return []
    fits = "" if it["fits"] else f"; it does not fit into a {facts['gpu']}: set its quantization, or take more GPUs"
    return [
        f"π from    {printable(it['model'])}, {it['quantization'] or it['dtype']}: {it['parameters']:,} parameters, "
        f"{size_text(it['weight_bytes'])} of weights; {it['tokens']:,} tokens of pairs, forward only, {it['flops']:.3g} FLOPs; "
        f"{size_text(it['device_bytes'])} per rank, before the reference is loaded{fits}"
    ]


def _bad_row_lines(facts: dict[str, Any]) -> list[str]:
    """The first unusable row, and a warning where a sample predicts too many of them."""
    first, share, allowed = facts["first_bad"], facts["bad_share"], facts["max_bad_fraction"]
    if first is None:
        return []
    lines = [f"unusable  the first: {one_line(first['source'])} line {first['line']}: {one_line(first['reason'])}"]
    if share > allowed:
        lines.append(
            f"warning   by this sample {share:.2%} of the rows are unusable, more than maxBadFraction {allowed:g}: the run "
            "would fail; leave --sample out to be certain"
        )
    return lines


def _fits_one_gpu(facts: dict[str, Any]) -> bool:
    """Then there is nothing to share or to offload, and the topology's line states the memory."""
    chosen = facts["topology"]
    return chosen is not None and chosen["stage"] == 0 and chosen["nodes"] * chosen["gpus_per_node"] == 1


def _memory_rows(memory: list[dict[str, Any]]) -> list[list[str]]:
    """One column per setting and one row per term; memory outside the GPU comes last."""
    heads = [f"stage {it['stage']}{'' if it['offload'] == 'none' else ', ' + it['offload']}" for it in memory]
    rows = [["memory per rank", *heads], ["ranks", *(str(it["ranks"]) for it in memory)]]
    for term in (*TERMS, "device", "host", "nvme"):
        name = "GPU total" if term == "device" else term
        rows.append([name, *(size_text(it[f"{term}_bytes"]) for it in memory)])
    return [*rows, ["fits", *("yes" if it["fits"] else "no" for it in memory)]]


def _topology_text(facts: dict[str, Any]) -> str:
    chosen = facts["topology"]
    if chosen is None:
        least = facts["memory"][-1]
        term = max(TERMS, key=lambda name: least[f"{name}_bytes"])
        return (
            f"topology  none fits: the last column needs {size_text(least['device_bytes'])} of a {facts['gpu']}'s "
            f"{size_text(facts['gpu_memory_bytes'])}, {size_text(least[f'{term}_bytes'])} of it for {term}; {_MAKE_ROOM[term]}"
        )
    world = f"{chosen['nodes']} node(s) × {chosen['gpus_per_node']} GPU(s), ZeRO stage {chosen['stage']}"
    is_offloaded = chosen["offload"] != "none"
    offload = f", weights in {chosen['offload']} memory (slower than estimated here)" if is_offloaded else ""
    return (
        f"topology  {world}{offload}, tokensPerBatch {chosen['tokens_per_batch']:,}: "
        f"{size_text(chosen['device_bytes'])} of {size_text(facts['gpu_memory_bytes'])} per rank, "
        f"{chosen['groups']} group(s), {duration_text(chosen['hours'])}"
    )


def duration_text(hours: float) -> str:
    """'0.34 seconds', '12 minutes', '2,290 hours': the unit that a person reads."""
    if hours >= 2:
        return f"{hours:.3g} hours" if hours < 1000 else f"{hours:,.0f} hours"
    if hours >= 2 / 60:
        return f"{hours * 60:.3g} minutes"
    return f"{hours * 3600:.0f} seconds" if hours * 3600 >= 10 else f"{hours * 3600:.2g} seconds"


def size_text(size_bytes: float) -> str:
    """'3.4 MB': decimal units, as GPUs and buckets are sold."""
    size, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:,.0f} {units[0]}"
