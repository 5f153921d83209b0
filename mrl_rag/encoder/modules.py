"""The modules of a sentence-transformers model that follow the pooling: Dense, LayerNorm, Normalize."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mrl_rag.encoder.recipe import ModuleSettings
from mrl_rag.errors import ModelFilesError


class Dense(nn.Module):
    """A linear map with an activation, float [n, in_features] -> [n, out_features].

    Args:
        in_features: length of the input.
        out_features: length of the output.
        bias: whether the map has a bias.
        activation_function: full name of a class of `torch.nn`.
        use_residual: add the input, mapped to `out_features` where the lengths differ.
    """

    # sentence-transformers' defaults: its files leave out settings that have them.
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_function: str = "torch.nn.modules.activation.Tanh",
        use_residual: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation_function = _activation(activation_function)
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return float [n, out_features]."""
        mapped: torch.Tensor = self.activation_function(self.linear(vectors))
        if self.use_residual:
            mapped = mapped + (self.residual(vectors) if hasattr(self, "residual") else vectors)
        return mapped


class LayerNorm(nn.Module):
    """A layer norm with learned scale and shift, float [n, dimension] -> [n, dimension]."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return float [n, dimension]."""
        normed: torch.Tensor = self.norm(vectors)
        return normed


class Normalize(nn.Module):
    """Scales each row to length 1, float [n, d] -> [n, d]."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return float [n, d]."""
        return nn.functional.normalize(vectors, p=2, dim=1)


def load_modules(folder: Path, specs: Sequence[ModuleSettings], width: int) -> tuple[nn.Sequential, int]:
    """Load the modules between pooling and truncation.

    Args:
        folder: the model's folder.
        specs: the modules of its recipe, in order.
        width: length of a pooled vector.

    Returns:
        One module that maps float32 [n, width] to [n, full_dim]; and full_dim.

    Raises:
        ModelFilesError: weights are damaged or missing, or don't fit the module's config.json or the module before it.
    """
    modules: list[nn.Module] = []
    for spec in specs:
        if spec.kind == "Normalize":
            modules.append(Normalize())
            continue
        name = folder / spec.path
        try:
            module: Dense | LayerNorm = Dense(**spec.settings) if spec.kind == "Dense" else LayerNorm(**spec.settings)
            module.load_state_dict(_load_weights(name))
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError, UnpicklingError) as error:
            raise ModelFilesError(
                f"the {spec.kind} module in {name} can't be loaded: {error}. It needs a config.json and weights that "
                "fit each other; download the model again."
            ) from error
        wanted = spec.settings["in_features" if spec.kind == "Dense" else "dimension"]
        if wanted != width:
            raise ModelFilesError(
                f"the {spec.kind} module in {name} takes vectors of {wanted} numbers; what comes before it gives "
                f"{width}. Download the model again."
            )
        width = spec.settings.get("out_features", width)
        modules.append(module)
    return nn.Sequential(*modules).eval().float(), width


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    found: dict[str, torch.Tensor] = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return found


def _activation(name: Any) -> nn.Module:
    match = re.fullmatch(r"torch\.nn\.(?:modules\.\w+\.)?(\w+)", str(name))
    found = getattr(nn, match[1], None) if match else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"activation_function is {name!r}, not a class of torch.nn")
    return found()
