"""Linear layers: projects a layer's inputs on the way forward, and the gradients of its outputs on the way back.

Another type of layer is captured by a module of its own beside this one, which hands its projected sides to the same
`PassSketches`.

Shapes: B examples, T tokens, P projected dims a side.
"""

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prism_job.errors import RequestError
from prism_job.extract.capture.sketches import PassSketches
from prism_job.extract.tokenise import Batch

_LEAVE_OUT = "leave this layer out with extraction.layers"


def register_hook(module: nn.Module, name: str, sketches: PassSketches) -> RemovableHandle:
    """Hand the projected sides of every call of this layer to `sketches`, until the handle is removed."""

    def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            what = f"no gradient can reach layer {name}: its inputs do not depend on the embeddings"
            raise RequestError(what, where=name, fix=_LEAVE_OUT)
        sides = [projections.sides[name] for projections in sketches.projections]
        inputs_BTI = _by_example(inputs[0].detach(), sketches.batch, name)
        a_sides = [inputs_BTI.to(side_a.dtype) @ side_a for side_a, _ in sides]
        sketches.expect_gradient(name)

        def on_gradient(gradient: Tensor) -> None:
            gradient_BTO = _by_example(gradient, sketches.batch, name)
            sketches.add(name, a_sides, [gradient_BTO.to(side_b.dtype) @ side_b for _, side_b in sides])

        output.register_hook(on_gradient)

    return module.register_forward_hook(on_forward)


def _by_example(values: Tensor, batch: Batch, name: str) -> Tensor:
    """[B, T, dims], also where the model has flattened examples and tokens into one axis, as OPT does."""
    if values.ndim == 2 and values.shape[0] == batch.ids_BT.numel():
        return values.view(*batch.ids_BT.shape, -1)
    if values.shape[:2] != batch.ids_BT.shape:
        what = f"layer {name} sees tensors of shape {tuple(values.shape)}, not one row a token"
        raise RequestError(what, where=name, fix=_LEAVE_OUT)
    return values
