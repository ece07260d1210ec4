"""Matrices in 8 bits with a scale for each block mean what a loop over their elements says."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny

from megatron_pbsd.checkpointing.block_scaled import BlockScaledFolder, read_plain
from megatron_pbsd.checkpointing.conversion.compare import damage, differences
from megatron_pbsd.checkpointing.conversion.driver import convert
from megatron_pbsd.checkpointing.conversion.to_hf import ToHf
from megatron_pbsd.checkpointing.conversion.to_megatron import ToMegatron
from megatron_pbsd.checkpointing.errors import CheckpointError
from tests.checkpointing.tiny_conversions import SMALL, change_config, change_weights, copy

BLOCK = (12, 10)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
PLAIN = ("embed_tokens", "lm_head", "mlp.gate.weight")
FC = "model.layers.0.mlp.down_proj.weight"
SCALE = f"{FC}_scale_inv"


def multiplied(matrix, scales):
    """Element by element."""
    made = torch.empty(matrix.shape, dtype=torch.float32)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            made[i, j] = float(matrix[i, j]) * float(scales[i // BLOCK[0], j // BLOCK[1]])
    return made


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A folder in 8 bits, and the weights that it stands for, as float32."""
    folder = make_tiny("deepseek_v3", tmp_path_factory.mktemp("fp8") / "hf")
    meant = load_file(folder / "model.safetensors")
    written = {}
    for name, tensor in meant.items():
        if tensor.dim() != 2 or any(part in name for part in PLAIN):
            written[name] = tensor if "correction_bias" in name else tensor.bfloat16()
            meant[name] = written[name].float()
            continue
        scales = torch.rand([-(-n // b) for n, b in zip(tensor.shape, BLOCK, strict=True)]) + 1e-3
        written[name], written[f"{name}_scale_inv"] = (tensor * 100).to(torch.float8_e4m3fn), scales
        meant[name] = multiplied(written[name], scales)
    save_file(written, folder / "model.safetensors")
    change_config(folder, quantization_config=QUANTIZATION, dtype="bfloat16")
    return folder, meant


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_an_import_is_what_the_blocks_stand_for(quantized, tmp_path, dtype):
    folder, meant = quantized
    convert(ToMegatron(folder, dtype, **SMALL), tmp_path / "megatron")
    convert(ToHf(tmp_path / "megatron"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == meant.keys()
    for name, tensor in meant.items():
        kept = torch.float32 if dtype or "correction_bias" in name else torch.bfloat16
        assert back[name].dtype == kept and torch.equal(back[name], tensor.to(kept)), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == read_plain(folder) | {"dtype": dtype or "bfloat16"}
    assert damage(tmp_path / "megatron") == damage(tmp_path / "back") == damage(folder) == []
    if dtype is None:
        assert differences(tmp_path / "megatron", folder) == ([], len(meant))


def test_transformers_loads_what_was_dequantized(quantized, tmp_path):
    from transformers import AutoModelForCausalLM

    convert(ToMegatron(quantized[0]), tmp_path / "megatron")
    convert(ToHf(tmp_path / "megatron"), tmp_path / "back")
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(told.values()), told


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_any_part_is_that_part_of_the_whole(quantized, data):
    folder, meant = quantized
    read = BlockScaledFolder(folder, BLOCK, torch.float32)
    name = data.draw(st.sampled_from([name for name in meant if meant[name].dim() == 2]))
    index = []
    for size in meant[name].shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    assert torch.equal(read.read(name, tuple(index)).float(), meant[name][tuple(index)])


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: change_weights(f, lambda w: w.pop(SCALE)), f"{FC} is float8_e4m3fn, but {SCALE} is missing"),
    (lambda f: change_weights(f, lambda w: w.update({SCALE: w[SCALE][:, :-1].contiguous()})),
     rf"{SCALE} is float32 \(3, 4\), blocks of \(12, 10\) of \(32, 48\) need float32 \(3, 5\)"),
    (lambda f: change_weights(f, lambda w: w.update({SCALE: w[SCALE].half()})), f"{SCALE} is float16"),
    (lambda f: change_weights(f, lambda w: w.update({FC: w[FC].bfloat16()})), f"{SCALE} has no matrix in 8 bits"),
    (lambda f: change_config(f, quantization_config=None), f"(?s){SCALE} is unexpected.*is float8_e4m3fn; supported"),
    (lambda f: change_config(f, dtype="int8"), "'dtype' = 'int8' is no dtype that matrices in 8 bits can be read as"),
    (lambda f: change_config(f, quantization_config=QUANTIZATION | {"quant_method": "awq", "weight_block_size": 128}),
     "'quantization_config.quant_method' = 'awq' is not .*'quantization_config.weight_block_size' = 128 is not a list"),
    (lambda f: change_config(f, quantization_config=QUANTIZATION | {"weight_block_size": [0, 128]}),
     r"'quantization_config.weight_block_size' = \[0, 128\] is not rows and columns"),
    (lambda f: change_config(f, quantization_config=QUANTIZATION | {"bits": 8}),
     "'quantization_config.bits' = 8 is not known"),
    (lambda f: change_config(f, quantization_config="fp8"), "'quantization_config' = 'fp8' is not an object"),
])
def test_what_does_not_fit_together_is_named(quantized, tmp_path, change, words):
    source = copy(quantized[0], tmp_path / "source")
    change(source)
    with pytest.raises(CheckpointError, match=words):
        convert(ToMegatron(source), tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
