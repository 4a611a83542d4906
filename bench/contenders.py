"""Everybody who can be timed, by the name used on the command line."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.baselines import Step


@dataclass(frozen=True)
class Contender:
    """`module:function` builds it: (case, dtype) -> step. Imported in the process that runs it."""

    name: str
    label: str
    builder: str
    ours: bool = False
    only_on: str | None = None  # a kind of device

    def build(self, *args: object) -> Step:
        module, function = self.builder.split(":")
        return getattr(importlib.import_module(module), function)(*args)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("door3", "fastmaml, door 3 (fused)", "bench.doors:fused", ours=True),
        Contender(
            "door3-in-graph",
            "fastmaml, door 3 in a graph of the user's",
            "bench.doors:fused_in_graph",
            ours=True,
            only_on="cuda",
        ),
        Contender(
            "door3-tf32x3",
            "fastmaml, door 3 (three TF32 products)",
            "bench.doors:fused_in_tf32x3",
            ours=True,
            only_on="cuda",
        ),
        Contender("door2", "fastmaml, door 2 (batched)", "bench.doors:batched", ours=True),
        Contender("door1", "fastmaml, door 1 (drop-in)", "bench.doors:drop_in", ours=True),
        Contender("eager", "clone/adapt loop in plain PyTorch", "bench.baselines:eager"),
        Contender("learn2learn", "learn2learn", "bench.peers:learn2learn"),
        Contender("higher", "higher", "bench.peers:higher"),
        Contender("torchopt", "TorchOpt", "bench.peers:torchopt"),
        Contender("metalearn", "parallel-metalearn", "bench.peers:parallel_metalearn"),
        Contender("vmap", "torch.func vmap, as written", "bench.baselines:vmapped"),
        Contender(
            "vmap-norm", "torch.func vmap, primitive norm", "bench.baselines:vmapped_primitive"
        ),
        Contender("compile", "compiled vmap, primitive norm", "bench.baselines:compiled"),
        Contender(
            "compile-graphs",
            "compiled vmap with CUDA graphs",
            "bench.baselines:compiled_with_graphs",
            only_on="cuda",
        ),
        Contender("jax", "JAX jit(vmap)", "bench.jax_peer:jax"),
    )
}
