"""ANIL (Raghu et al., ICLR 2020): MAML's recipes, but only the classifier is adapted."""

from dataclasses import replace
from functools import partial

from fastmaml.algorithms import ANIL
from fastmaml.examples import maml
from fastmaml.examples.recipe import main

RECIPES = {
    name: replace(recipe, algorithm=partial(ANIL, lr=0.1), steps=5, test_steps=5)
    for name, recipe in maml.RECIPES.items()
}

if __name__ == "__main__":
    main(RECIPES)
