"""Meta-SGD (Li et al., 2017): a learned inner rate for every element, one inner step."""

from dataclasses import replace
from functools import partial

from fastmaml.algorithms import MetaSGD
from fastmaml.examples import maml
from fastmaml.examples.recipe import main

RECIPES = {
    name: replace(recipe, algorithm=partial(MetaSGD, lr=0.1), steps=1, test_steps=1)
    for name, recipe in maml.RECIPES.items()
}

if __name__ == "__main__":
    main(RECIPES)
