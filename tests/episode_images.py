"""Images of every kind that episodes are drawn from, 70 of each."""

import torch

IMAGES = {
    "grey bytes": torch.randint(256, (70, 7, 7), dtype=torch.uint8),
    "one-channel bytes": torch.randint(256, (70, 1, 28, 28), dtype=torch.uint8),
    "colour bytes": torch.randint(256, (70, 3, 5, 5), dtype=torch.uint8),
    "float32": torch.randn(70, 2, 3, 3),
    "float64": torch.randn(70, 4, 4, dtype=torch.float64),
    "bfloat16": torch.randn(70, 1, 5, 5).bfloat16(),
    "float16": torch.randn(70, 3, 3).half(),
    "films": torch.randn(70, 2, 3, 4, 4),
    "vectors": torch.randn(70, 11),
}
