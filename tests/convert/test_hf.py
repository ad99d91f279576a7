"""A whole model directory: written, opened by transformers, read back.

Only API that transformers 4.57 and 5 share, so that the file runs under either.
"""

import json
import random
import re
import weakref

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Phi3ForCausalLM,
)
from transformers.utils import logging

from phi4.convert import read_hf, write_hf
from phi4.convert.hf_shards import INDEX_NAME
from phi4.convert.hf_tokenizer import PROBE
from phi4.errors import CheckpointError, ConfigError
from phi4.model.names import megatron_shapes, to_hf
from tests.support.hugging_face import phi3_config

QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory, weights, model, tokenizer):
    out = tmp_path_factory.mktemp("hf") / "model"
    write_hf(out, weights.items(), model, tokenizer, dtype="fp32", max_shard_bytes=100_000)
    return out


def test_transformers_model_has_every_tensor_where_it_belongs(written, weights, model):
    opened = AutoModelForCausalLM.from_pretrained(written, dtype="auto")
    expected = dict(to_hf(name, tensor, model) for name, tensor in weights.items())
    found = opened.state_dict()

    assert isinstance(opened, Phi3ForCausalLM)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_transformers_model_has_the_recipes_rope_base(written, model):
    opened = AutoModelForCausalLM.from_pretrained(written)
    exponents = torch.arange(0, model.head_dim, 2) / model.head_dim

    torch.testing.assert_close(opened.model.rotary_emb.inv_freq, model.rope_theta**-exponents)


def test_transformers_reads_ids_and_dtype_after_the_eos_fix(tmp_path, weights, model, tokenizer):
    write_hf(tmp_path / "bf16", weights.items(), model, tokenizer)
    config = AutoConfig.from_pretrained(tmp_path / "bf16")
    generation = GenerationConfig.from_pretrained(tmp_path / "bf16")

    assert config.dtype == torch.bfloat16
    assert config.bos_token_id == tokenizer.eod_id
    assert config.eos_token_id == tokenizer.im_end_id
    assert config.pad_token_id == tokenizer.pad_id
    assert config.sliding_window is None
    assert config.max_position_embeddings == config.original_max_position_embeddings == 64
    assert generation.eos_token_id == [tokenizer.eod_id, tokenizer.im_end_id]


def test_transformers_tokenizer_gives_the_same_ids(written, tokenizer):
    opened = AutoTokenizer.from_pretrained(written)
    chat = [{"role": "user", "content": PROBE}]
    header = [tokenizer.im_start_id, *tokenizer.encode("user"), tokenizer.im_sep_id]
    answer = [tokenizer.im_start_id, *tokenizer.encode("assistant"), tokenizer.im_sep_id]
    # Hugging Face's text path strips the spaces beside added tokens.
    turn = [*header, *tokenizer.encode(PROBE.strip()), tokenizer.im_end_id, *answer]
    text = opened.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    assert opened(PROBE)["input_ids"] == tokenizer.encode(PROBE)
    assert opened(text)["input_ids"] == turn
    assert opened.decode(tokenizer.encode(PROBE)) == PROBE
    assert len(opened) == tokenizer.vocab_size
    assert opened.eos_token_id == tokenizer.im_end_id
    assert opened.pad_token_id == tokenizer.pad_id


def test_transformers_opens_phi4s_tokenizer_without_a_warning(
    tmp_path, model, phi4_tokenizer, caplog
):
    """4.57.6 takes a large vocabulary beside an undated config for Mistral's and warns."""
    large = model.model_copy(update={"vocab_size": phi4_tokenizer.vocab_size})
    zeros = ((name, torch.zeros(shape)) for name, shape in megatron_shapes(large).items())
    write_hf(tmp_path / "out", zeros, large, phi4_tokenizer)
    logging.enable_propagation()
    try:
        opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    finally:
        logging.disable_propagation()

    assert caplog.messages == []
    assert opened(PROBE)["input_ids"] == phi4_tokenizer.encode(PROBE)


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_read_gives_back_what_was_written_bitwise(
    tmp_path, weights, model, tokenizer, dtype, torch_dtype
):
    stored = {name: tensor.to(torch_dtype) for name, tensor in weights.items()}
    shuffled = list(stored.items())
    random.Random(1).shuffle(shuffled)
    write_hf(tmp_path / "out", shuffled, model, tokenizer, dtype=dtype, max_shard_bytes=30_000)
    read_model, stream, stored_dtype = read_hf(tmp_path / "out")

    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert (read_model, stored_dtype) == (model, dtype)
    for _ in range(2):
        found = dict(stream())
        assert list(found) == list(stored)
        assert all(torch.equal(found[name], stored[name]) for name in stored)
        assert {tensor.dtype for tensor in found.values()} == {torch_dtype}


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
def test_read_of_a_directory_that_transformers_saved(tmp_path, weights, model, max_shard_size):
    reference = Phi3ForCausalLM(phi3_config(model))
    reference.load_state_dict(dict(to_hf(n, t, model) for n, t in weights.items()))
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    read_model, stream, stored_dtype = read_hf(tmp_path)
    found = dict(stream())

    assert (read_model, stored_dtype) == (model, "fp32")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def add_tensors(hf_dir, tensors):
    """One more shard, which the index names."""
    save_file(tensors, hf_dir / "more.safetensors")
    path = hf_dir / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "more.safetensors")
    path.write_text(json.dumps(index))


def inv_freq(model, theta):
    return theta ** -(torch.arange(0, model.head_dim, 2) / model.head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ropes_old_buffer_is_no_weight(tmp_path, weights, model, tokenizer, dtype):
    out = tmp_path / "out"
    write_hf(out, weights.items(), model, tokenizer, dtype="bf16")
    buffer = inv_freq(model, model.rope_theta).to(dtype)
    names = ["model", *(f"model.layers.{i}.self_attn" for i in range(model.num_layers))]
    add_tensors(out, {f"{name}.rotary_emb.inv_freq": buffer.clone() for name in names})
    read_model, stream, stored_dtype = read_hf(out)

    assert dict(stream()).keys() == weights.keys()
    assert (read_model, stored_dtype) == (model, "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x**0.7, r"inv_freq does not match config\.json's rope_theta=250000; use the"),
        (lambda x: x[:-1], r"inv_freq has shape \[3\], config\.json says \[4\]"),
        (lambda x: x * torch.nan, r"inv_freq has non-finite values: 4 of 4"),
    ],
)
def test_another_rope_buffer_is_refused(tmp_path, weights, model, tokenizer, change, message):
    out = tmp_path / "out"
    write_hf(out, weights.items(), model, tokenizer)
    buffer = change(inv_freq(model, model.rope_theta)).clone()
    add_tensors(out, {"model.layers.1.self_attn.rotary_emb.inv_freq": buffer})

    with pytest.raises(CheckpointError, match=message):
        read_hf(out)


def test_streams_hold_one_tensor_at_a_time(tmp_path, weights, model, tokenizer):
    alive, most = weakref.WeakSet(), 0

    def counted(stream):
        nonlocal most
        for name, tensor in stream:
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    copies = ((name, tensor.clone()) for name, tensor in weights.items())
    write_hf(tmp_path / "a", counted(copies), model, tokenizer)
    write_hf(tmp_path / "b", counted(read_hf(tmp_path / "a")[1]()), model, tokenizer)

    # The one that the consumer still names, and the one that is being made.
    assert most <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop(QKV),
            "1 tensors are missing, the first is model.layers.0.self_attn.qkv_proj",
        ),
        (lambda w: w.update({QKV: w[QKV][:40]}), r"\[40, 48\], expected 80 rows"),
        (
            lambda w: w.update({"output_layer.weight": w["output_layer.weight"][:544]}),
            r"lm_head.weight has shape \[544, 48\], expected \[1088, 48\]",
        ),
        (
            lambda w: w.update({"output_layer.bias": w[QKV]}),
            "'output_layer.bias' is not a Phi-4 tensor",
        ),
        (
            lambda w: w.update({"decoder.layers.3.input_layernorm.weight": w[QKV]}),
            "layers.3.input_layernorm.weight is not part of the model",
        ),
    ],
)
def test_wrong_weights_are_refused_and_leave_nothing(
    tmp_path, weights, model, tokenizer, change, message
):
    wrong = dict(weights)
    change(wrong)

    with pytest.raises(CheckpointError, match=message):
        write_hf(tmp_path / "out", wrong.items(), model, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_given_twice_is_refused(tmp_path, weights, model, tokenizer):
    twice = [*weights.items(), next(iter(weights.items()))]

    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight came twice"):
        write_hf(tmp_path / "out", twice, model, tokenizer)


def test_an_occupied_directory_is_left_alone(tmp_path, weights, model, tokenizer):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="is not empty; give a new directory"):
        write_hf(tmp_path, weights.items(), model, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_directory_is_filled(tmp_path, weights, model, tokenizer):
    write_hf(tmp_path, weights.items(), model, tokenizer)

    assert read_hf(tmp_path)[0] == model


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(tmp_path, weights, model, tokenizer):
    small = model.model_copy(update={"vocab_size": 1023})

    with pytest.raises(ConfigError, match=r"has 1024 ids, but model\.vocab_size=1023"):
        write_hf(tmp_path / "out", weights.items(), small, tokenizer)


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/config.json cannot be read")):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")]
)
def test_a_damaged_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=message):
        read_hf(tmp_path)
