"""Argument checks, in one place and one form: what was expected, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastmaml.data.task_batch import TaskBatch

LABEL_DTYPES = (torch.int64, torch.uint8)  # that F.cross_entropy takes
_BATCH_FIELDS = ("support_x", "support_y", "query_x", "query_y")


def positive_int(name: str, value: object) -> int:
    """``value`` as a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value


def steps_count(steps: object) -> int:
    """``steps`` as an int of zero or more."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an int of 0 or more, got {steps!r}")
    return steps


def one_task(tasks: int | None, cannot: str) -> None:
    """Refuse what a learner of several tasks ``cannot`` do with its parameters."""
    if tasks is not None:
        raise RuntimeError(
            f"{cannot} the parameters of a learner of {tasks} tasks, which are values; "
            "change the base module before clone(), or give theta [T, P] to set_theta()"
        )


def memory_budget(value: object) -> int | None:
    """``value`` as a number of bytes; None for a backend's own."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"memory_budget must be an int of 0 or more bytes, or None, got {value!r}")
    return value


def adaptable(model: object, accepts: Callable[[str, nn.Parameter], bool] | None) -> None:
    """``model`` is a module whose parameters, where ``accepts`` has them, can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for path, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and _keeps_parameters(path, part, accepts):
            where = f" as its part {path}" if path else ""
            raise TypeError(
                f"model must be an nn.Module before torch.jit.script or torch.jit.trace, got a "
                f"{type(part).__name__}{where}, which runs with its own parameters only; pass the "
                "module that it was made of"
            )


def _keeps_parameters(
    path: str, part: nn.Module, accepts: Callable[[str, nn.Parameter], bool] | None
) -> bool:
    """Whether TorchScript has parameters of ``part`` that are to be adapted, or hides its own."""
    lead = f"{path}." if path else ""
    return "_parameters" not in vars(part) or any(
        p.requires_grad and (accepts is None or accepts(lead + name, p))
        for name, p in part.named_parameters()
    )


def one_of_lr_and_inner(lr: object, inner: object) -> None:
    """Either a learning rate is given or an inner optimizer."""
    from fastmaml.inner import InnerOptimizer

    if lr is None and inner is None:
        raise ValueError(
            "lr or inner must be given, got neither; for example lr=0.01, or "
            "inner=fastmaml.inner.Adam(lr=0.01)"
        )
    if inner is None:
        learning_rate(lr)
        return
    if not isinstance(inner, InnerOptimizer):
        raise TypeError(
            f"inner must be an optimizer of fastmaml.inner, got {type(inner).__name__}; "
            "for example fastmaml.inner.Adam(lr=0.01)"
        )
    if lr is not None:
        raise ValueError(f"lr must be None with inner, which has a rate of its own; got {lr!r}")


def learning_rate(lr: object) -> None:
    """``lr`` is a finite number of any kind (NumPy's too), or a tensor of one number."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr must be a number or a tensor of one element, got shape {list(lr.shape)}; "
                "use fastmaml.algorithms.MetaSGD for one rate per parameter"
            )
    elif isinstance(lr, bool) or not isinstance(lr, Real):
        raise TypeError(f"lr must be a number or a tensor, got {type(lr).__name__}")
    elif not math.isfinite(lr):
        raise ValueError(f"lr must be a finite number, got {lr}")


def task_axis(x: object, tasks: int) -> None:
    """``x`` is ``[T, N, ...]`` with T = ``tasks`` and at least one example."""
    if not isinstance(x, Tensor):
        return
    if x.ndim < 2 or x.shape[0] != tasks or x.shape[1] < 1:
        raise ValueError(
            f"x must have shape [T, N, ...] with T = {tasks} tasks and N >= 1, "
            f"got {list(x.shape)}; a learner made by clone(tasks={tasks}) takes all tasks at once"
        )


def batch(
    value: object, like: Tensor, *, labels_needed: bool, several_dtypes: bool = False
) -> TaskBatch:
    """``value`` is a TaskBatch of consistent tensors that match the parameters ``like``.

    ``several_dtypes``: which the parameters have, so that their module knows what to make of x.
    """
    from fastmaml.data.task_batch import TaskBatch

    if not isinstance(value, tuple) or len(value) != 4:
        raise TypeError(
            "batch must be a fastmaml.TaskBatch(support_x, support_y, query_x, query_y), "
            f"got {type(value).__name__}"
        )
    if _in_minibatches(value):
        _minibatches(*value[:2])
        batch(
            (value[0][0], value[1][0], *value[2:]),
            like,
            labels_needed=labels_needed,
            several_dtypes=several_dtypes,
        )
        return TaskBatch(*value)
    tasks = _tasks(value)
    for name, tensor in zip(_BATCH_FIELDS, value, strict=True):
        if tensor is None and name == "query_y" and not labels_needed:
            continue
        _field(name, tensor, tasks, like, any_dtype=several_dtypes or name.endswith("_y"))
    if value[0].shape[2:] != value[2].shape[2:]:
        raise ValueError(
            f"query_x must have the examples' shape of support_x, {list(value[0].shape[2:])}, "
            f"got {list(value[2].shape[2:])}"
        )
    if value[0].dtype != value[2].dtype:
        odd, other = (0, 2) if value[2].dtype == like.dtype else (2, 0)
        raise ValueError(
            f"{_BATCH_FIELDS[odd]} must have the dtype of {_BATCH_FIELDS[other]}, "
            f"{value[other].dtype}, got {value[odd].dtype}; convert it with .to("
            f"{value[other].dtype})"
        )
    for x, y in ((0, 1), (2, 3)):
        if value[y] is not None and value[y].shape[:2] != value[x].shape[:2]:
            raise ValueError(
                f"{_BATCH_FIELDS[y]} must start with the shape [T, N] of {_BATCH_FIELDS[x]}, "
                f"{list(value[x].shape[:2])}, got {list(value[y].shape)}"
            )
    return value if isinstance(value, TaskBatch) else TaskBatch(*value)


def _tasks(value: tuple[object, ...]) -> int:
    """T, as most of the tensors have it: one of them may lack the axis."""
    lengths = [len(t) for t in value if isinstance(t, Tensor) and t.ndim]
    return max(lengths, key=lengths.count, default=1)


def _in_minibatches(value: tuple[object, ...]) -> bool:
    x, y, query_x = value[:3]
    if not (isinstance(x, Tensor) and isinstance(query_x, Tensor)):
        return False
    one_set = isinstance(y, Tensor) and y.ndim == 2 and y.shape == x.shape[:2]
    return x.ndim == query_x.ndim + 1 and not one_set  # else query_x lacks an axis


def _minibatches(x: Tensor, y: object) -> None:
    if 0 in x.shape[:3]:
        raise ValueError(
            f"support_x must have shape [B, T, N, ...] with at least one of each, got "
            f"{list(x.shape)}"
        )
    if not isinstance(y, Tensor) or y.shape[:3] != x.shape[:3]:
        came = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"support_y must start with the shape [B, T, N] of support_x, {list(x.shape[:3])}, "
            f"got {came}"
        )


def minibatch_steps(batch: TaskBatch, steps: int) -> None:
    """There is a step for each mini-batch of the support set."""
    count = batch.minibatches
    if count is not None and 0 < steps < count:
        raise ValueError(
            f"steps must be at least the {count} mini-batches of support_x, got {steps}; leave "
            "out the others"
        )


def form(batch: object) -> tuple[object, ...]:
    """All that :func:`batch` looks at: batches of equal forms pass or fail alike."""
    parts = batch if isinstance(batch, tuple) else ()
    return type(batch), *[
        (t.shape, t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else type(t)
        for t in parts
    ]


def _field(name: str, tensor: object, tasks: int, like: Tensor, *, any_dtype: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [T, N, ...], got {type(tensor).__name__}")
    if tensor.ndim < 2 or tensor.shape[0] != tasks or 0 in tensor.shape[:2]:
        hint = "; a single task is T = 1: unsqueeze(0)" if tensor.ndim < 2 else ""
        raise ValueError(
            f"{name} must have shape [T, N, ...] with T = {tasks} >= 1 tasks and "
            f"N >= 1 examples, got {list(tensor.shape)}{hint}"
        )
    placed_like(name, tensor, like, any_dtype=any_dtype)


def placed_like(name: str, tensor: Tensor, like: Tensor, *, any_dtype: bool = False) -> None:
    """``tensor`` is on the device of the parameters ``like`` and, if of floats, of their dtype."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the parameters' device {like.device}, got {tensor.device}; "
            "move one of them with .to(device)"
        )
    if tensor.dtype != like.dtype and tensor.is_floating_point() and not any_dtype:
        raise ValueError(
            f"{name} must have the parameters' dtype {like.dtype}, got {tensor.dtype}; "
            f"convert it with .to({like.dtype})"
        )


_LOSS_NAMES = {"cross_entropy": "cross_entropy", "nll": "nll_loss"}


def known_loss_targets(
    kind: str, name: str, y: Tensor, output_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Targets of a built-in loss match the network's per-example output and its dtype."""
    if kind == "mse":
        if y.shape[2:] != output_shape or not y.is_floating_point():
            raise ValueError(
                f"{name} must be float targets of shape [T, N, "
                f"{', '.join(map(str, output_shape))}] for mse_loss, got {list(y.shape)} "
                f"of {y.dtype}"
            )
        if y.dtype != dtype:
            raise ValueError(
                f"{name} must have the inputs' dtype {dtype} for mse_loss, got {y.dtype}; "
                f"convert it with .to({dtype})"
            )
        return
    if y.dtype not in LABEL_DTYPES or y.ndim != 2 or len(output_shape) != 1:
        raise ValueError(
            f"{name} must be int64 labels of shape [T, N] for {_LOSS_NAMES[kind]} with outputs "
            f"[T, N, classes], got {list(y.shape)} of {y.dtype} and outputs "
            f"[T, N, {', '.join(map(str, output_shape))}]"
        )


def class_targets(name: str, y: Tensor, outputs: Tensor) -> None:
    """Targets that ``F.cross_entropy`` takes: labels, or class probabilities like the outputs."""
    if y.dtype in LABEL_DTYPES or (y.is_floating_point() and y.shape == outputs.shape):
        return
    raise ValueError(
        f"{name} must be int64 labels, or class probabilities of the outputs' shape "
        f"{list(outputs.shape)}, for cross_entropy, got {list(y.shape)} of {y.dtype}; convert "
        "labels with .long()"
    )


def some_left_out(ignored: int, targets: Sequence[Tensor], classes: int) -> bool:
    """Whether there are labels ``ignored`` among class indices, all on the CPU."""
    labels = torch.cat([y.flatten() for y in targets])
    kept = labels[labels != ignored]
    left_out = len(kept) < len(labels)
    return left_out and bool(((kept >= 0) & (kept < classes)).all())


def labels_in_range(name: str, y: Tensor, classes: int) -> None:
    """Cross-entropy labels are class indices. On the CPU: a look elsewhere would synchronise."""
    if not y.is_cpu:
        return
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name} must be labels in [0, {classes}), got values from {low} to {high}; "
            "labels are positions in the task, see fastmaml.data.transforms.RemapLabels"
        )


def adapt_loss(loss: object, tasks: int | None) -> Tensor:
    """``loss`` is a finite scalar (or ``[T]`` for T tasks) that depends on parameters."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
    by_task = tasks is not None and tuple(loss.shape) == (tasks,)
    one = tasks is None and loss.numel() == 1  # which PyTorch differentiates too
    if loss.ndim != 0 and not by_task and not one:
        expected = "a scalar" if tasks is None else f"losses of shape [{tasks}] or their sum"
        raise ValueError(f"loss must be {expected}, got shape {list(loss.shape)}; reduce it first")
    if not loss.requires_grad:
        raise RuntimeError(
            "loss must depend on the learner's parameters, but it has no gradient; compute it "
            "from this learner's output, outside torch.no_grad()"
        )
    finite_loss(loss)
    return loss


def all_used(missed: Sequence[str]) -> None:
    """A loss depends on all parameters: on those ``missed`` as well."""
    if missed:
        raise RuntimeError(
            f"loss does not depend on the parameters {', '.join(missed)}; "
            "pass allow_unused=True to leave them as they are, or freeze them"
        )


def finite_loss(loss: Tensor) -> None:
    """The loss is a number; checked where that needs no device synchronisation."""
    if loss.device.type == "cpu" and not math.isfinite(
        (loss if loss.ndim == 0 else loss.detach().sum()).item()
    ):
        raise FloatingPointError(
            f"loss must be finite, got {loss.detach().tolist()}; lower the inner learning rate "
            "or check the data for NaN"
        )
