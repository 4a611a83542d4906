"""Inner optimizers: what a learner does with a gradient, differentiable, with hyperparameters that
may be meta-learned.

::

    maml = fastmaml.MAML(model, inner=inner.Adam(lr=inner.Learned(0.01, per="parameter")))

They follow ``torch.optim`` in formula and names. Gradients flow through the whole inner loop,
moments included, in all three doors; each task has moments of its own, which start at zero with
each ``clone()``.

Where all gradients of an element have been zero, its second moment v is zero, and the square root
there has no derivative: it is taken to be zero, and so the derivative of the step stays finite
(1 / eps in the gradient, as that of g / (sqrt(v) + eps) is for small g).
"""

from fastmaml.inner.hyperparameters import Learned
from fastmaml.inner.optimizers import SGD, Adam, AdamW, InnerOptimizer, RMSprop

__all__ = ["SGD", "Adam", "AdamW", "InnerOptimizer", "Learned", "RMSprop"]
