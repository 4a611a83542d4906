"""MetaOptNet as a Lightning module."""

from __future__ import annotations

from typing import ClassVar

from fastmaml.algorithms.lightning.episodic import LightningEpisodicModule
from fastmaml.algorithms.lightning.protonet import LightningPrototypicalNetworks
from fastmaml.nn import SVClassifier


class LightningMetaOptNet(LightningPrototypicalNetworks):
    """Meta-learning with a support-vector machine on the embeddings (Lee et al. 2019).

    Arguments are those of :class:`LightningPrototypicalNetworks`, with the options svm_C_reg (0.1)
    and svm_max_iters (15) of :class:`fastmaml.nn.SVClassifier` in place of the distance.
    """

    svm_C_reg = 0.1  # noqa: N815  (learn2learn's name)
    svm_max_iters = 15

    option_names: ClassVar[tuple[str, ...]] = (
        *LightningEpisodicModule.option_names,
        "svm_C_reg",
        "svm_max_iters",
    )

    def new_classifier(self) -> SVClassifier:
        """A classifier with the options' regularisation."""
        return SVClassifier(C_reg=self.svm_C_reg, max_iters=self.svm_max_iters)
