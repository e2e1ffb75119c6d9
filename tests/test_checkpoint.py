"""Reading checkpoints: Hugging Face directories and GGUF files, good and bad."""

import json
import shutil
import sys

import gguf as gguf_package
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from tiny_models import VOCAB, random_ids, save_model
from tokenizers import models, pre_tokenizers, trainers

import cachedattn as ca
from cachedattn import gguf
from cachedattn.checkpoint import hf_config, load_checkpoint
from cachedattn.config import KvLayout, StoreConfig, parse_size


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture
def copy(model_path, tmp_path):
    return shutil.copytree(model_path, tmp_path / "copy")


def edit(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture .* not 'GPT2LMHeadModel'"),
        ({"architectures": None}, "architecture .* not None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised .*'awq'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type .*'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks its factor"),
        ({"num_key_value_heads": 4}, "num_heads 6 is not a multiple of num_kv_heads 4"),
    ],
)
def test_unsupported_configurations_are_named(copy, fields, message):
    edit(copy, **fields)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(copy)


def test_old_and_new_rope_fields_mean_the_same(model_path):
    raw = json.loads((model_path / "config.json").read_text())
    del raw["rope_parameters"]
    old = {**raw, "rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**raw, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}}
    assert hf_config(old).rope == hf_config(new).rope
    assert hf_config(old).rope.theta == 7e4


def test_qwen2_uses_its_window_only_when_told(model_path):
    raw = json.loads((model_path / "config.json").read_text())
    raw |= {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}
    assert hf_config(raw).sliding_window == 0
    assert hf_config({**raw, "use_sliding_window": True}).sliding_window == 64
    with pytest.raises(ValueError, match="some layers only"):
        hf_config({**raw, "use_sliding_window": True, "max_window_layers": 1})


def test_only_safetensors_are_read(copy):
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors .*pytorch_model\.bin can run code"):
        load_checkpoint(copy)


def test_missing_and_damaged_files(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_checkpoint(tmp_path / "nowhere")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_checkpoint(copy)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16"):
        load_checkpoint(copy, "int8")


def test_sharded_equals_whole(model_path, tmp_path):
    sharded = save_model(tmp_path / "sharded", layers=2, shard="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    a, b = load_checkpoint(model_path, "float32"), load_checkpoint(sharded, "float32")
    assert a.weights.keys() == b.weights.keys()
    assert all(torch.equal(weight, b.weights[name]) for name, weight in a.weights.items())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../../outside.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside"):
        load_checkpoint(sharded)


def test_identity_covers_weights_dtype_and_rope(copy):
    base = load_checkpoint(copy, "float32").identity
    assert load_checkpoint(copy, "float32").identity == base
    assert load_checkpoint(copy, "bfloat16").identity != base
    edit(copy, max_position_embeddings=999, eos_token_id=3)  # not in the KV
    assert load_checkpoint(copy, "float32").identity == base
    edit(copy, rope_parameters={"rope_type": "default", "rope_theta": 10001.0})
    assert load_checkpoint(copy, "float32").identity != base
    shutil.copy(copy / "model.safetensors", copy / "kept")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    changed = load_checkpoint(copy, "float32").identity
    assert changed != base


def test_a_store_of_another_model_is_refused(model_path, copy):
    edit(copy, rope_parameters={"rope_type": "default", "rope_theta": 10001.0})
    layout = load_checkpoint(copy, "float32").kv_layout()
    with ca.AttentionStore(StoreConfig(dram="4MiB"), layout) as store:
        with pytest.raises(ValueError, match=r"the store is for model 'copy'.*identity"):
            ca.Engine.from_pretrained(model_path, store=store, dtype="float32")
        with pytest.raises(ValueError, match="dtype float32 differs from bfloat16"):
            ca.Engine.from_pretrained(copy, store=store)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5", 5), ("2KiB", 2048), ("1.5 MiB", 3 << 19), ("3gb", 3 * 10**9), ("1TiB", 2**40)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "five", "1XB", "-1", -1, "1e9"])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="size"):
        parse_size(size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dram": 0}, "dram must not be 0"),
        ({"dram": "lots"}, "dram: not a size"),
        ({"ssd": "1GiB"}, "ssd needs path"),
        ({"path": "kv"}, "path needs ssd"),
        ({"block_size": 48}, "block_size must be one of"),
        ({"policy": "random"}, "policy must be one of"),
        ({"io": "dma"}, "io must be one of"),
        ({"dram_reserve": 1.0}, "dram_reserve"),
        ({"io_depth": 0}, "io_depth"),
    ],
)
def test_bad_store_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        StoreConfig(**fields)
    with pytest.raises(ValueError, match="identity must be 32 bytes"):
        KvLayout(1, 1, 16, "float32", b"short")


@pytest.fixture(scope="module")
def bpe():
    """A small trained byte-level BPE with two control tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the theory of the thing, there and then 1234"] * 9, trainer)
    return backend


def write_gguf(path, checkpoint, bpe, quantization):
    """The checkpoint as llama.cpp writes it: its names, q and k rows in pair order."""
    config = checkpoint.config
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token, _ in vocab])
    merges = json.loads(bpe.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")
    names = {ours: theirs for theirs, ours in gguf._LAYER_NAMES.items()}
    tops = {ours: theirs for theirs, ours in gguf._TOP_NAMES.items()}
    for name, weight in checkpoint.weights.items():
        if "q_proj" in name or "k_proj" in name:
            halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[-1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if name in tops:
            theirs = tops[name]
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            theirs = f"blk.{layer}.{names[part]}.weight"
        data = weight.numpy()
        if weight.dim() == 2:
            kind = gguf_package.GGMLQuantizationType[quantization]
            packed = gguf_package.quants.quantize(data, kind)
            writer.add_tensor(theirs, packed, raw_dtype=kind)
        else:
            writer.add_tensor(theirs, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_gguf_weights(model_path, tmp_path, bpe, quantization):
    expected = load_checkpoint(model_path, "float32")
    path = write_gguf(tmp_path / "m.gguf", expected, bpe, quantization)
    got = load_checkpoint(path, "float32")
    kind = gguf_package.GGMLQuantizationType[quantization]
    assert got.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        if weight.dim() == 2:  # rows are permuted, not mixed: quantising commutes with it
            packed = gguf_package.quants.quantize(weight.numpy(), kind)
            weight = torch.from_numpy(gguf_package.quants.dequantize(packed, kind))
        assert torch.equal(got.weights[name], weight), name
    for field in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope", "rms_eps"):
        ours, theirs = getattr(got.config, field), getattr(expected.config, field)
        assert ours == theirs or ours == pytest.approx(theirs)
    assert got.config.vocab_size == VOCAB and not got.config.tied_embeddings


def test_gguf_gives_the_same_tokens_as_the_directory(model_path, tmp_path, bpe):
    path = write_gguf(tmp_path / "m.gguf", load_checkpoint(model_path, "float32"), bpe, "F32")
    answers = []
    for source in (model_path, path):
        with ca.Engine.from_pretrained(source, dtype="float32") as engine:
            sampling = ca.SamplingParams(max_tokens=8, ignore_eos=True)
            answers.append(engine.generate(random_ids(30), sampling).token_ids)
    assert answers[0] == answers[1]


def test_gguf_tokenizer_equals_its_source(model_path, tmp_path, bpe):
    path = write_gguf(tmp_path / "m.gguf", load_checkpoint(model_path, "float32"), bpe, "F16")
    tokenizer = load_checkpoint(path).tokenizer
    for text in ("the other theory: 2026, naïve 漢字\n\tthen", "<s>there</s>"):
        assert tokenizer.encode(text, add_special_tokens=False) == bpe.encode(text).ids
    assert tokenizer.encode("the") == [0, *bpe.encode("the").ids]
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.render([{"role": "user", "content": "hi"}]) == "<s>hi"


def test_damaged_gguf_is_refused(model_path, tmp_path, bpe):
    path = write_gguf(tmp_path / "m.gguf", load_checkpoint(model_path, "float32"), bpe, "Q8_0")
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    cuts = [3, 5, 9, 20, *rng.integers(24, len(data) - 1, 40).tolist()]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"GGUF|cut short|fewer bytes"):
            load_checkpoint(path)
    path.write_bytes(b"GGUF\x09\0\0\0" + data[8:])
    with pytest.raises(ValueError, match="version 9"):
        load_checkpoint(path)


def test_a_missing_package_is_named(model_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # makes its import fail
    with pytest.raises(ModuleNotFoundError, match=r"needs safetensors: pip install"):
        load_checkpoint(model_path)
