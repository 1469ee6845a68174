"""True to transformers: the golden files of tests/data, made by make_golden.py there."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from numpy_layers import forward
from safetensors.numpy import load_file, save_file

from models import gpt, swin, vit

DATA = Path(__file__).parent.parent / "data"
GPT = gpt.Config(vocab_size=13, context_length=9, num_layers=3, num_heads=2, width=16)
VIT = vit.Config(
    image_size=12,
    patch_size=4,
    num_classes=5,
    num_layers=3,
    num_heads=2,
    width=16,
    mlp_width=24,
)
SWIN = swin.Config(
    image_size=36,
    patch_size=3,
    num_classes=5,
    width=8,
    depths=(2, 4),
    num_heads=(1, 2),
    window_size=3,
)


def expect_golden(model, name):
    golden = np.load(DATA / f"{name}.npz")
    inputs = golden["inputs"]
    inputs = inputs if name == "gpt2" else np.moveaxis(inputs, 1, -1)
    model.eval()
    np.testing.assert_allclose(forward(model, jnp.asarray(inputs)), golden["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("config", "kind", "name"),
    [
        (GPT, gpt.GPT, "gpt2"),
        (dataclasses.replace(GPT, dropout=0.5, pad_vocab_to_multiple_of=8), gpt.GPT, "gpt2"),
        (VIT, vit.ViT, "vit"),
        (dataclasses.replace(SWIN, stochastic_depth=0.5), swin.Swin, "swin"),
    ],
)
def test_logits_equal_those_of_transformers(config, kind, name):
    model = kind.from_safetensors(DATA / f"{name}.safetensors", config)
    expect_golden(model, name)


@pytest.mark.parametrize("multiple", [1, 8])
def test_gpt_2_is_saved_bit_for_bit(tmp_path, multiple):
    config = dataclasses.replace(GPT, pad_vocab_to_multiple_of=multiple)
    model = gpt.GPT.from_safetensors(DATA / "gpt2.safetensors", config)
    assert model.token_embedding.embedding.shape == ({1: 13, 8: 16}[multiple], 16)
    model.to_safetensors(tmp_path / "saved.safetensors")
    saved, original = (tmp_path / "saved.safetensors"), (DATA / "gpt2.safetensors")
    assert saved.read_bytes() == original.read_bytes()


def rewritten(tmp_path, name, change):
    """The path of a golden file with other tensors."""
    save_file(change(load_file(DATA / f"{name}.safetensors")), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_reads_what_older_files_have_too(tmp_path):
    def older(tensors):
        bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        buffers = {f"h.{i}.attn.bias": np.ones((1, 1, 9, 9), np.float32) for i in range(3)}
        masked = {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(3)}
        return bare | buffers | masked | {"lm_head.weight": bare["wte.weight"].copy()}

    path = rewritten(tmp_path, "gpt2", older)
    expect_golden(gpt.GPT.from_safetensors(path, GPT), "gpt2")


def test_reads_16_bits_into_float32_parameters(tmp_path):
    path = rewritten(
        tmp_path, "vit", lambda t: {n: x.astype(ml_dtypes.bfloat16) for n, x in t.items()}
    )
    model = vit.ViT.from_safetensors(path, VIT)
    kernel = load_file(DATA / "vit.safetensors")["classifier.weight"].T
    assert model.head.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(
        model.head.kernel[...], kernel.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


def test_lists_all_that_does_not_fit():
    config = dataclasses.replace(VIT, num_classes=7, num_layers=2, norm="rms")
    with pytest.raises(ValueError, match="does not fit this config") as raised:
        vit.ViT.from_safetensors(DATA / "vit.safetensors", config)
    lines = [line.strip() for line in str(raised.value).splitlines()[1:]]
    assert "classifier.weight: (5, 16) where (7, 16) belongs" in lines
    assert "classifier.bias: (5,) where (7,) belongs" in lines
    assert "layernorm.bias: unknown" in lines
    # 2 of the head and what to do, the biases of 2 x 2 + 1 norms, and the 16 tensors of the third
    # block.
    assert len(lines) == 2 + 1 + 5 + 16
    with pytest.raises(ValueError, match=r"blocks\.5\.layernorm_before\.weight: missing"):
        swin.Swin.from_safetensors(
            DATA / "swin.safetensors", dataclasses.replace(SWIN, depths=(2, 6))
        )
    with pytest.raises(ValueError, match="convolution/kernel: no tensor holds such a leaf"):
        swin.Swin.from_safetensors(
            DATA / "swin.safetensors", dataclasses.replace(SWIN, num_linear_stages=1)
        )


def test_a_head_that_is_not_tied_is_an_error(tmp_path):
    path = rewritten(
        tmp_path, "gpt2", lambda t: t | {"lm_head.weight": 2 * t["transformer.wte.weight"]}
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from wte\.weight"):
        gpt.GPT.from_safetensors(path, GPT)


def test_an_embedding_that_is_stored_as_the_head_alone_loads(tmp_path):
    def head_alone(tensors):
        return tensors | {"lm_head.weight": tensors.pop("transformer.wte.weight")}

    path = rewritten(tmp_path, "gpt2", head_alone)
    assert "transformer.wte.weight" not in load_file(path)
    expect_golden(gpt.GPT.from_safetensors(path, GPT), "gpt2")


def test_fine_tunes_with_another_head():
    model = vit.ViT.from_safetensors(DATA / "vit.safetensors", VIT)
    model.head = nnx.Linear(16, 2, rngs=nnx.Rngs(0))
    assert forward(model, jnp.zeros((1, 12, 12, 3))).shape == (1, 2)


def test_an_index_of_several_files_is_one_file(tmp_path):
    tensors = load_file(DATA / "gpt2.safetensors")
    names = sorted(tensors)
    parts = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, held in parts.items() for name in held}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expect_golden(gpt.GPT.from_safetensors(index, GPT), "gpt2")
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"2\.safetensors is not there"):
        gpt.GPT.from_safetensors(index, GPT)
    for text in ("", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match="is no index of safetensors files"):
            gpt.GPT.from_safetensors(index, GPT)


def test_what_is_no_safetensors_file_is_said(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="is not there"):
        gpt.GPT.from_safetensors(file, GPT)
    with pytest.raises(ValueError, match="is a folder: name the file in it"):
        gpt.GPT.from_safetensors(tmp_path, GPT)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n")
    with pytest.raises(ValueError, match=r"a pointer of Git LFS.* run git lfs pull"):
        gpt.GPT.from_safetensors(file, GPT)
    whole = (DATA / "gpt2.safetensors").read_bytes()
    for content in (b"", b"PK\x03\x04" + bytes(100), whole[:50], whole[:-10]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file, or it is cut off"):
            gpt.GPT.from_safetensors(file, GPT)


def backbone(tensors):
    """As published: without the model's name and the classifier, and with a pooler."""
    kept = {name: t for name, t in tensors.items() if "classifier" not in name}
    bare = {name.partition(".")[2]: t for name, t in kept.items()}
    return bare | {"pooler.dense.weight": np.ones((16, 16), np.float32)}


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("change", [backbone, dict], ids=["backbone", "other classes"])
def test_a_backbone_gets_a_new_head_on_request(tmp_path, caplog, name, change):
    kind, config = {"vit": (vit.ViT, VIT), "swin": (swin.Swin, SWIN)}[name]
    path = rewritten(tmp_path, name, change)
    with pytest.raises(ValueError, match="new_head=True leaves out the file's classifier"):
        kind.from_safetensors(path, dataclasses.replace(config, num_classes=7))
    model = kind.from_safetensors(
        path, dataclasses.replace(config, num_classes=7), new_head=True, rngs=nnx.Rngs(3)
    )
    left_out = "pooler.dense.weight" if change is backbone else "classifier.bias, classifier.weight"
    assert f"left out {left_out}." in caplog.text
    kernel = np.asarray(model.head.kernel[...])
    assert kernel.shape[1] == 7
    assert 0 < kernel.std() < 1
    whole = kind.from_safetensors(DATA / f"{name}.safetensors", config)
    model.head = whole.head
    expect_golden(model, name)
