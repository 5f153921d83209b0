"""The arguments of `MatryoshkaEncoder`: checked, and chosen for the machine where they are left out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from mrl_rag.arguments import is_integer
from mrl_rag.encoder.loading import ModelFiles
from mrl_rag.encoder.tokenizing import LongInputs
from mrl_rag.errors import InvalidDimension, InvalidInput, InvalidVectors
from mrl_rag.heads import MatryoshkaHead
from mrl_rag.tasks import Task
from mrl_rag.truncation import check_dim

if TYPE_CHECKING:
    import torch

Device: TypeAlias = "str | torch.device"
Backend: TypeAlias = Literal["torch", "openvino"]


def as_devices(asked: Device | Sequence[Device] | None) -> list[torch.device]:
    """Return the devices asked for, refusing names that torch doesn't know; for None a GPU, or else the CPU."""
    import torch

    if asked is None:
        if torch.cuda.is_available():
            return [torch.device("cuda")]
        return [torch.device("mps" if torch.backends.mps.is_available() else "cpu")]
    names = list(asked) if isinstance(asked, list | tuple) else [cast("Device", asked)]
    if not names:
        raise InvalidInput("device is an empty list; name a device, or pass None to have one chosen.")
    return [_as_device(name) for name in names]


def _as_device(asked: Device) -> torch.device:
    import torch

    try:
        return torch.device(asked)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(f"device is {asked!r}, which torch doesn't know: pass 'cpu', 'cuda' or 'cuda:1'.") from error


def check_present(devices: list[torch.device]) -> None:
    """Refuse GPUs that don't exist."""
    import torch

    # Counted, not tried: a try would take memory on the device.
    found = torch.cuda.device_count()
    for device in devices:
        if device.type == "cuda" and (device.index or 0) >= found:
            raise InvalidInput(
                f"device is {str(device)!r}, and torch {torch.__version__} finds {found} GPUs here. Pass device='cpu' "
                "or a device that exists, or install a build of torch that supports it."
            )


def as_dtype(asked: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name, refusing those that the encoder doesn't support."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for name, value in known.items():
        if asked in (name, value):
            return value
    raise InvalidInput(f"dtype is {asked!r}; it must be one of {', '.join(map(repr, known))}, or None.")


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware runs it fast, else float32."""
    import torch

    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Without these instructions bfloat16 is emulated, and slower than float32.
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def check_backend(asked: object, devices: list[torch.device]) -> Backend:
    """Return the backend asked for, "torch" for None, refusing one that doesn't run on these devices."""
    if asked not in (None, *get_args(Backend)):
        raise InvalidInput(f"backend is {asked!r}; it must be 'torch', 'openvino', or None for 'torch'.")
    if asked == "openvino" and any(device.type != "cpu" for device in devices):
        raise InvalidInput(
            f"backend='openvino' runs on a CPU, and device is {', '.join(map(str, devices))}. Pass device='cpu', or "
            "leave backend out."
        )
    return "openvino" if asked == "openvino" else "torch"


def check_long_inputs(asked: object) -> LongInputs:
    """Return `long_inputs` when it is one of its values."""
    for known in get_args(LongInputs):
        if asked == known:
            return cast(LongInputs, known)
    raise InvalidInput(f"long_inputs is {asked!r}; it must be one of {', '.join(map(repr, get_args(LongInputs)))}.")


def check_keep_alive(asked: object) -> float | None:
    """Return `keep_alive` when it is a positive number of seconds, or None."""
    if asked is None:
        return None
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not asked > 0:
        raise InvalidInput(
            f"keep_alive is {asked!r}; it must be a positive number of seconds, as in keep_alive=300, or None to keep "
            "the model loaded."
        )
    return float(asked)


def check_head(head: MatryoshkaHead | None, full_dim: int) -> MatryoshkaHead | None:
    """Return a head, refusing one for vectors of another length."""
    if head is not None and head.full_dim != full_dim:
        shape = (head.full_dim, head.full_dim)
        raise InvalidVectors(f"head has shape {shape}; this model needs ({full_dim}, {full_dim}).")
    return head


def pick_dim(dim: int | None, truncate_dim: int | None, full_dim: int) -> int:
    """Return the dimension of calls that name none, refusing a `dim` and a `truncate_dim` that differ."""
    if None not in (dim, truncate_dim) and dim != truncate_dim:
        raise InvalidDimension(
            f"dim is {dim!r} and truncate_dim is {truncate_dim!r}; they are two names of one setting. Pass one of them."
        )
    asked = truncate_dim if dim is None else dim
    return full_dim if asked is None else check_dim(asked, full_dim)


def pick_max_length(asked: int | None, files: ModelFiles, tokenizer: Any, positions: int) -> int:
    """Return the longest input in tokens, for None as `SentenceTransformer.max_seq_length` has it."""
    stated = files.recipe.max_length or (files.spec.max_length if files.spec else 0)
    counted = getattr(files.load_config(), "max_position_embeddings", -1)  # XLNet says -1
    limit = int(min(tokenizer.model_max_length, counted if counted > 0 else 2**31))
    if asked is None:
        return min(stated or limit, positions)
    # Rotary scaling takes some networks past the positions in their config, but nothing past the end of a table.
    limit = min(max(limit, stated, files.spec.max_length if files.spec else 0), positions)
    if not is_integer(asked, 3, limit):
        raise InvalidInput(
            f"max_length is {asked!r}; it must be an integer from 3 to {limit}, the longest input this network takes."
        )
    return asked


def warn_of_differences(
    model: str, files: ModelFiles, prompts: Mapping[Task, str], asked: Mapping[Task, str] | None
) -> None:
    """Warn of what the authors of a model intended and this encoder doesn't do."""
    similarity, passage_prompt = files.recipe.similarity, files.recipe.passage_prompt
    if similarity != "cosine":
        warnings.warn(
            f"the authors of {model} compare its vectors by {similarity!r}. Here they are scaled to length 1 and "
            "compared by cosine, which can rank differently: measure it, or use a model made for cosine.",
            stacklevel=4,
        )
    if passage_prompt and not prompts["document"] and "document" not in (asked or {}):
        prompt = {"document": passage_prompt}
        warnings.warn(
            f"{model} has a prompt for passages and none named 'document', so documents get none, as in "
            f"sentence-transformers' encode_document. Pass prompts={prompt!r}, or prompts={{'document': ''}}.",
            stacklevel=4,
        )
