"""Meta-Curvature (Park and Oliva, NeurIPS 2019): learned transforms of the inner gradients."""

from dataclasses import replace
from functools import partial

from fastmaml.algorithms import GBML
from fastmaml.data import fc100
from fastmaml.examples import maml
from fastmaml.examples.recipe import main
from fastmaml.optim import MetaCurvatureTransform

_SMALL = replace(
    maml.RECIPES["cifarfs"],
    algorithm=partial(GBML, transform=MetaCurvatureTransform, lr=0.1),
    shots=1,
)
RECIPES = {"fc100": replace(_SMALL, data=fc100), "cifarfs": _SMALL}

if __name__ == "__main__":
    main(RECIPES)
