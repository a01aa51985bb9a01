"""How the computations of sampling are compiled: for inference, one graph for each shape, weights as constants."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Products with few rows want other kernels than the usual; which is best is timed once for each shape.
_FEW_ROWS = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
# Calling kernels from C++ and joining products of one input: a fifth of a small model's time.
_CPU = {"cpp_wrapper": True, "cpp.enable_concat_linear": True}
# The host is slower than the device at small batches; a recorded graph needs it once a step.
_GPU = {"triton.cudagraphs": True}
_QUIET = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
# Every graph holds its own copy of frozen weights, packed for its shapes, which only small models can afford.
_MOST_FROZEN = 300_000_000
# Scales, schedules, spans of a cache and batch sizes: each has a graph of its own.
_MOST_GRAPHS = 64


def compiled(
    function: Callable[..., Any], device: torch.device, num_parameters: int, few_rows: bool = False
) -> Callable[..., Any]:
    """A function compiled for inference; its first call with new shapes takes a minute.

    Weights may be read once: later changes to them go unnoticed. For a small model on a CPU this switches torch's
    `freezing` on in the process, and for a large one off, which concerns what is compiled from then on and run without
    gradients.

    Args:
        function: takes tensors and whatever else determines its graph.
        device: of the tensors.
        num_parameters: of the models behind the function.
        few_rows: whether its products have few rows, as when a teacher samples one token of an image.

    Raises:
        ValueError: torch is too old.
    """
    if "isolate_recompiles" not in signature(torch.compile).parameters:
        raise ValueError(f"compiling needs torch 2.13 or newer, this is {torch.__version__}")
    options: dict[str, Any] = _QUIET | (_FEW_ROWS if few_rows else {})
    options |= _CPU if device.type == "cpu" else _GPU
    if device.type == "cpu":
        torch._inductor.config.freezing = num_parameters < _MOST_FROZEN
    # Asking each of hundreds of weights whether it is still the same takes a tenth of a small model's time.
    options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    run = torch.compile(  # type: ignore[call-overload]
        function, dynamic=False, options=options, recompile_limit=_MOST_GRAPHS, isolate_recompiles=True
    )
    return run if device.type == "cpu" else _keeping(run)


def _keeping(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose results stay: a recorded graph writes the next ones to the same place."""

    @wraps(run)
    def kept(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, torch.clone, run(*args))

    return kept
