"""Plain matrices: projects what a weight is multiplied with on the way forward, and its output's gradient on the way back.

Another type of weight is captured by a module of its own beside this one, which hands its projected sides to the same
`PassSketches`.

Shapes: B examples, R rows an example (its T tokens, or several rows a token), P projected dims a side.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from prism_job.extract.capture.sketches import PassSketches
from prism_job.extract.load.quantised import is_quantised

_PLAIN = (nn.Linear.forward, Conv1D.forward)
_PLAIN_CLASSES = ("FalconLinear",)
"""Of these layers the input and the output of a call are the two sides."""


def register_hooks(name: str, module: nn.Module, sketches: PassSketches) -> list[RemovableHandle]:
    """Hand the projected sides of every use of this module's weight to `sketches`, until the handles are removed."""
    class_ = type(module)
    if class_.forward in _PLAIN or class_.__name__ in _PLAIN_CLASSES or is_quantised(module.weight):
        return [module.register_forward_hook(lambda _, inputs, output: _on_use(name, inputs[0], output, sketches))]

    # A router: its weight is in a product inside its forward, which may cast it first and return something else.
    outer: list[Any] = []

    def linear(values: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = outer[-1](values, matrix, bias)
        is_cast = not isinstance(matrix, nn.Parameter) and matrix.shape == module.weight.shape
        if matrix is module.weight or is_cast:
            _on_use(name, values, output, sketches)
        return output

    def on_enter(*_: object) -> None:
        outer.append(functional.linear)
        functional.linear = linear  # type: ignore[assignment]  # as DeepSpeed does, which may have been here before

    def on_exit(*_: object) -> None:
        functional.linear = outer.pop()

    return [module.register_forward_pre_hook(on_enter), module.register_forward_hook(on_exit, always_call=True)]


def _on_use(name: str, values: Tensor, output: Tensor, sketches: PassSketches) -> None:
    if not sketches.is_captured(name, output):
        return
    values_BRI = sketches.by_example(name, values.detach())
    if values_BRI is None:
        return
    sides = [projections.sides[name] for projections in sketches.projections]
    a_sides = [values_BRI.to(side_a.dtype) @ side_a for side_a, _ in sides]
    sketches.expect_gradient(name)

    def on_gradient(gradient: Tensor) -> None:
        gradient_BRO = sketches.by_example(name, gradient)
        assert gradient_BRO is not None  # it has the shape of the input, but for the last axis
        sketches.add(name, a_sides, [gradient_BRO.to(side_b.dtype) @ side_b for _, side_b in sides])

    output.register_hook(on_gradient)
