"""Overflow cuts against a float64 decoder that cuts the same un-rotated K and V."""

import pytest
import torch
from tiny_models import open_engine, random_ids, save_model

import cachedattn as ca
from cachedattn.checkpoint import load_checkpoint
from cachedattn.rope import inverse_frequencies

TOLERANCE = 2e-4  # of a logit; float32 against float64


class ReferenceDecoder:
    """One token at a time in float64. Keeps each layer's K before RoPE, and V; a token's
    position is its place among those kept."""

    def __init__(self, path, block_size: int, window: int, ratio: float, keep_first: int) -> None:
        checkpoint = load_checkpoint(path, "float32")
        self.config = checkpoint.config
        self.weights = {name: w.double() for name, w in checkpoint.weights.items()}
        self.inv_freq = inverse_frequencies(self.config.rope)
        self.window = window // block_size * block_size
        self.first = -(-keep_first // block_size) * block_size
        droppable = (self.window - self.first) // block_size
        self.cut = max(1, int(ratio * droppable)) * block_size
        self.num_cuts = 0
        self.kept = [(None, None) for _ in range(self.config.num_layers)]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [n, heads, D] turned to `positions` [n], halves paired."""
        angle = positions.double()[:, None, None] * self.inv_freq
        a, b = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean() + self.config.rms_eps).sqrt() * self.weights[name + ".weight"]

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        c = self.config
        name = f"model.layers.{layer}.self_attn."
        q, k, v = (self.weights[f"{name}{p}_proj.weight"] @ x for p in "qkv")
        k, v = k.view(1, c.num_kv_heads, c.head_dim), v.view(1, c.num_kv_heads, c.head_dim)
        if self.kept[layer][0] is not None:
            k, v = torch.cat([self.kept[layer][0], k]), torch.cat([self.kept[layer][1], v])
        self.kept[layer] = (k, v)
        positions = torch.arange(len(k))
        q = self.rotate(q.view(1, c.num_heads, c.head_dim), positions[-1:])[0]
        group = c.num_heads // c.num_kv_heads
        k = self.rotate(k, positions).repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,nhd->hn", q, k) * c.head_dim**-0.5
        out = torch.einsum("hn,nhd->hd", scores.softmax(-1), v.repeat_interleave(group, dim=1))
        return self.weights[name + "o_proj.weight"] @ out.flatten()

    def __call__(self, token: int) -> torch.Tensor:
        """Logits [vocab] after `token`."""
        if self.kept[0][0] is not None and len(self.kept[0][0]) == self.window:
            self.num_cuts += 1
            keep = torch.ones(self.window, dtype=torch.bool)
            keep[self.first : self.first + self.cut] = False
            self.kept = [(k[keep], v[keep]) for k, v in self.kept]
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.config.num_layers):
            name = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, name + "input_layernorm"), layer)
            h = self.norm(x, name + "post_attention_layernorm")
            gate = torch.nn.functional.silu(self.weights[name + "mlp.gate_proj.weight"] @ h)
            up = self.weights[name + "mlp.up_proj.weight"] @ h
            x = x + self.weights[name + "mlp.down_proj.weight"] @ (gate * up)
        return self.weights["lm_head.weight"] @ self.norm(x, "model.norm")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


def turn(engine: ca.Engine, ids: list[int], max_tokens: int) -> tuple[ca.Reply, dict]:
    """A greedy turn, and the logits after each token that was computed."""
    seen: dict[int, torch.Tensor] = {}

    def keep(_request: ca.Request, first: int, logits: torch.Tensor) -> None:
        seen.update(enumerate(logits, first))

    sampling = ca.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = engine.add_request(ids, sampling, on_logits=keep)
    while not request.finished:
        engine.step()
        engine.store.check_invariants()
    return request.reply(), seen


@pytest.mark.parametrize("dropped", ["", "dram"], ids=["dram", "ssd"])
@pytest.mark.parametrize("keep_first", [0, 4])
@pytest.mark.parametrize(("block_size", "window"), [(16, 96), (16, 103), (64, 256)])
def test_equals_the_float64_reference(
    model_path, tmp_path, block_size, window, keep_first, dropped
):
    truncation = ca.Truncation(ratio=0.5, keep_first=keep_first)
    reference = ReferenceDecoder(model_path, block_size, window, 0.5, keep_first)
    store = ca.StoreConfig(
        dram="24MiB", ssd="64MiB", path=str(tmp_path / "kv"), block_size=block_size, load="always"
    )
    ids, expected = random_ids(2 * window + 41), []
    with open_engine(model_path, store, max_model_len=window, truncation=truncation) as engine:
        for _turn in range(2):
            reply, seen = turn(engine, ids, max_tokens=12)
            tokens = ids + reply.token_ids
            expected += [reference(token) for token in tokens[len(expected) : -1]]
            assert sorted(seen) == list(range(reply.num_cached_tokens, len(tokens) - 1))
            for index, logits in seen.items():
                assert (logits - expected[index]).abs().max() < TOLERANCE
            # The client sends everything again, dropped tokens included, and more.
            ids = tokens + random_ids(30, seed=5)
            if dropped:
                engine.store.drop_tier(dropped)
        assert reference.num_cuts >= 3
        assert reply.num_cached_tokens == 2 * window + 41 + 12 - 1
        tier = "ssd" if dropped else "dram"
        assert 0 < reply.cached_from[tier] <= window
        assert sum(reply.cached_from.values()) == reply.cached_from[tier]


def test_a_cut_history_is_not_found_by_its_remaining_tokens(model_path):
    """Lineage: what is left after a cut was computed under what left; others may not reuse it."""
    truncation = ca.Truncation(keep_first=0)
    store = ca.StoreConfig(dram="24MiB", block_size=16)
    with open_engine(model_path, store, max_model_len=96, truncation=truncation) as engine:
        ids = random_ids(100)
        turn(engine, ids, max_tokens=4)
        reply, _ = turn(engine, [*ids[48:96], 3], max_tokens=4)
    assert reply.num_cached_tokens == 0


def test_truncation_off_refuses_long_prompts(model_path):
    with open_engine(model_path, max_model_len=96, truncation=None) as engine:
        with pytest.raises(ValueError, match=r"97 tokens exceed max_model_len 96"):
            engine.generate(random_ids(97))
        reply = engine.generate(random_ids(90), ca.SamplingParams(ignore_eos=True))
        assert reply.finish_reason == "length"
        assert len(reply.token_ids) == 6


def test_a_window_without_a_block_to_drop_is_refused(model_path):
    with pytest.raises(ValueError, match="window"):
        open_engine(model_path, max_model_len=96, truncation=ca.Truncation(keep_first=64))
