"""The sections `spec.model`, the reference model, and `spec.scoring.preferenceModel`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from prism_job.errors import DataError, RequestError, TransientError
from prism_job.spec.section import Section, Uri, check_uri


class ModelSpec(Section):
    """A model. `model` is the reference: gradients are computed with it, and π unless `scoring.preferenceModel` is set."""

    uri: Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(check_uri)] = Field(
        description="Hub id, folder, s3:// prefix, or a .gguf file. PRISM runs no remote code and reads no pickles."
    )
    revision: Annotated[str, StringConstraints(max_length=256)] = Field(
        "main", description="Branch, tag or commit of a hub model; ignored for other kinds of uri."
    )
    adapter: Uri | None = Field(
        None, description="Folder or s3:// prefix of a PEFT adapter. If set, gradients are taken of its layers only."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Data type of the weights in the forward and backward pass. With bfloat16, projected inputs and gradients "
        "are rounded to bfloat16 too, else they are float32. Sketches and sums are always float32.",
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        None,
        description="Quantise the weights of linear layers and fused experts with bitsandbytes while they are loaded. nf4: "
        "4.13 bits a weight (double quantisation). int8: 8 bits, one scale for each output. Inputs, products and gradients "
        "keep `dtype`, as do embeddings, output head and adapter. Not with stage: 3 or a GGUF file. A checkpoint that "
        "bitsandbytes has already quantised needs no setting.",
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto",
        description="Attention backend. `auto` is `sdpa`, or `eager` for the architectures that have no `sdpa` (Gemma 2, "
        "gpt-oss, BLOOM, Mamba). The backend is part of the extractor digest, because it changes the last bits of a row.",
    )

    def __str__(self) -> str:
        return f"{self.uri} with the adapter {self.adapter}" if self.adapter else self.uri

    @property
    def product_dtype(self) -> Literal["bfloat16", "float32"]:
        """Data type in which layers' inputs and output gradients are multiplied by the projections' signs."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"


_FIELD = re.compile(
    rf"\bmodel(\.(?:{'|'.join(str(field.alias) for field in ModelSpec.model_fields.values())})\b)|(?<=spec\.)model$"
)


@contextmanager
def naming_preference_model() -> Iterator[None]:
    """Errors about `spec.model` name `spec.scoring.preferenceModel`, where the same code reads that model."""
    try:
        yield
    except (RequestError, DataError, TransientError) as error:
        what, where, fix = (
            _FIELD.sub(r"scoring.preferenceModel\1", text) for text in (error.what, error.where, error.fix)
        )
        raise type(error)(what, where=where, fix=fix) from error
