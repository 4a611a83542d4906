"""MAML (Finn et al., ICML 2017) on Omniglot, mini-ImageNet and CIFAR-FS."""

from functools import partial

from torch.optim import Adam

from fastmaml.algorithms import MAML
from fastmaml.data import cifarfs, mini_imagenet, omniglot
from fastmaml.examples.recipe import Recipe, main
from fastmaml.vision.models import CNN4, OmniglotFC

RECIPES = {
    "omniglot": Recipe(
        data=omniglot,
        network=lambda ways: OmniglotFC(28 * 28, ways),
        algorithm=partial(MAML, lr=0.5),
        meta_optimizer=partial(Adam, lr=0.003),
    ),
    "mini-imagenet": Recipe(
        data=mini_imagenet,
        network=lambda ways: CNN4(ways, hidden_size=32),
        algorithm=partial(MAML, lr=0.01),
        meta_optimizer=partial(Adam, lr=0.001),
        shots=5,
        queries=15,
        steps=5,
        test_steps=10,
        tasks=2,
        iterations=60_000,
    ),
    "cifarfs": Recipe(
        data=cifarfs,
        network=lambda ways: CNN4(ways, hidden_size=64, embedding_size=64 * 2 * 2),
        algorithm=partial(MAML, lr=0.1),
        meta_optimizer=partial(Adam, lr=0.001),
        shots=5,
        queries=5,
        steps=5,
        test_steps=5,
    ),
}

if __name__ == "__main__":
    main(RECIPES)
