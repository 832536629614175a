"""The section `spec.model`: the reference model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from prism_job.spec.section import Section, Uri, check_uri


class ModelSpec(Section):
    """The reference model: the one whose gradients and preferences are taken."""

    uri: Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(check_uri)] = Field(
        description="Hub id, folder, s3:// prefix, or a .gguf file. No remote code is run and no pickle is read."
    )
    revision: Annotated[str, StringConstraints(max_length=256)] = Field(
        "main", description="Branch, tag or commit of a hub model; other kinds of uri have none."
    )
    adapter: Uri | None = Field(
        None, description="Folder or s3:// prefix of a PEFT adapter; its layers are then the trainable space."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16",
        description="Type of the weights in the forward and backward pass. In bfloat16 projected inputs and gradients are "
        "rounded to it as well, else they are float32; sketches and sums are float32.",
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention backend; part of the extractor digest because it changes last bits."
    )

    @property
    def product_dtype(self) -> Literal["bfloat16", "float32"]:
        """Type in which layers' inputs and output gradients are multiplied by the projections' signs."""
        return "bfloat16" if self.dtype == "bfloat16" else "float32"
