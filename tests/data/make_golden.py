"""Makes the golden files: small models of Hugging Face's transformers, and what they compute.

In an environment of its own: `pip install torch transformers`, then
`python tests/data/make_golden.py`. For each model it writes `<name>.safetensors`, the weights
as transformers saves them, and `<name>.npz`, the inputs and the logits in float32.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

FOLDER = Path(__file__).parent


def make(name: str, model: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Writes a model with random weights, and its logits."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # Biases and norms too move off their initial values, so that they count.
            is_scale = parameter.ndim == 1 and path.endswith("weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.3)
        logits = model.eval()(inputs).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        (Path(folder) / "model.safetensors").replace(FOLDER / f"{name}.safetensors")
    np.savez(FOLDER / f"{name}.npz", inputs=inputs.numpy(), logits=logits.numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    make(
        "gpt2",
        GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=9, n_embd=16, n_layer=3, n_head=2)),
        torch.randint(13, (2, 9)),
    )
    make(
        "vit",
        ViTForImageClassification(
            ViTConfig(
                image_size=12,
                patch_size=4,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=24,
                num_labels=5,
            )
        ),
        torch.randn(2, 3, 12, 12),
    )
    make(
        "swin",
        SwinForImageClassification(
            SwinConfig(
                image_size=36,
                patch_size=3,
                embed_dim=8,
                depths=[2, 4],
                num_heads=[1, 2],
                window_size=3,
                num_labels=5,
            )
        ),
        torch.randn(2, 3, 36, 36),
    )
