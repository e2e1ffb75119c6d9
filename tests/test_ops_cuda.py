"""What the ops promise on CUDA alone: streams, graphs, large shapes, refusal of mixed devices.

The tests of test_ops_attention.py and test_ops_cache.py run on CUDA as well.
"""

import pytest
import torch
from ops_reference import Case, check, relative_error

from cachedattn import ops

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

LARGE = [
    ([2048], [2048], (8, 2)),  # prefill
    ([300, 1, 129], [3000, 5000, 129], (14, 2)),  # a mix; 14 / 2 has rows that fill no tile
    ([128], [8192], (8, 2)),  # extend
    ([1] * 33, list(range(1, 3301, 100)), (32, 8)),  # decode
    ([1, 4], [32768, 20000], (8, 8)),  # decode over many splits
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("q_lens", "kv_lens", "heads"), LARGE)
def test_large_shapes(q_lens, kv_lens, heads, head_dim, dtype):
    flags = {"block_size": 64, "dtype": dtype, "device": DEVICE}
    check(Case(q_lens, kv_lens, heads, head_dim, **flags))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_repetition_gives_the_same_bits(dtype):
    case = Case([1, 200], [9000, 3000], (8, 2), 128, block_size=64, dtype=dtype, device=DEVICE)
    args = case.args()
    out, lse = ops.attn_paged(*args)
    for _ in range(20):
        again, again_lse = ops.attn_paged(*args)
        assert torch.equal(again, out) and torch.equal(again_lse, lse)


def test_append_and_merge_of_many_rows():
    tokens, heads, dim = 70_000, 2, 64  # more than a grid has in its second dimension
    kv = torch.zeros(tokens // 64 + 1, 2, heads, 64, dim, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, tokens, heads, dim, device=DEVICE).to(kv.dtype)
    ops.kv_append(k, v, kv, torch.arange(tokens, device=DEVICE))
    stored = kv.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens]
    assert torch.equal(stored[0], k) and torch.equal(stored[1], v)
    merged, lse = ops.merge_states(k[None], torch.zeros(1, tokens, heads, device=DEVICE))
    assert torch.equal(merged, k) and not lse.any()


class Step:
    """kv_append of the last token of each sequence, then attention, over tensors that stay."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.args = case.args()
        self.q, self.kv, self.table = self.args[:3]
        self.last = [(n - 1) // case.block_size for n in case.kv_lens]
        slots = [int(self.table[b, i]) for b, i in enumerate(self.last)]
        places = [(n - 1) % case.block_size for n in case.kv_lens]
        self.slots = torch.tensor(slots, device=self.q.device) * case.block_size
        self.slots += torch.tensor(places, device=self.q.device)
        self.k = torch.stack([keys[-1] for keys in case.keys]).to(self.q.device)
        self.v = torch.stack([values[-1] for values in case.values]).to(self.q.device)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        ops.kv_append(self.k, self.v, self.kv, self.slots)
        return ops.attn_paged(*self.args)

    def load(self, other: Case) -> None:
        """Puts another case of the same shape into the tensors, its last K and V apart."""
        step = Step(other)
        for mine, new in ((self.q, step.q), (self.kv, step.kv), (self.table, step.table)):
            mine.copy_(new)
        self.kv[step.slots // other.block_size, :, :, step.slots % other.block_size] = float("nan")
        for mine, new in ((self.slots, step.slots), (self.k, step.k), (self.v, step.v)):
            mine.copy_(new)


def decode_case(seed: int) -> Case:
    shape = ([1] * 5, [70, 1, 700, 64, 2000], (8, 2), 128)
    return Case(*shape, block_size=64, dtype=torch.bfloat16, seed=seed, device=DEVICE)


def test_a_captured_graph_serves_new_contents():
    step = Step(decode_case(0))
    step.run()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step.run()
    for seed in (1, 2):
        other = decode_case(seed)
        step.load(other)
        graph.replay()
        assert relative_error(out.cpu(), other.reference()[0]) < 5e-3
        assert torch.equal(out, step.run()[0])


def test_work_is_in_the_order_of_the_current_stream():
    case, other = decode_case(3), decode_case(4)
    expected = case.run()[0]
    step = Step(other)
    step.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        step.load(case)  # what the ops read arrives late, on their own stream
        out, _ = step.run()
    stream.synchronize()
    assert torch.equal(out, expected)


def test_no_op_waits_for_the_device():
    step = Step(decode_case(5))
    step.run()
    x = torch.randn(5, 8, 128, device=DEVICE)
    positions = torch.arange(5, dtype=torch.int32, device=DEVICE)
    tables = step.args[7:9]
    states, lse = torch.randn(2, 5, 8, 128, device=DEVICE), torch.randn(2, 5, 8, device=DEVICE)
    ops.rope_apply_(x, positions, *tables)
    ops.merge_states(states, lse)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    step.run()
    ops.rope_apply_(x, positions, *tables)
    ops.merge_states(states, lse)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


TENSORS = {"kv": 1, "block_table": 2, "kv_lens": 3, "cu_q": 4, "plan": 5, "rope_lo": 7, "sinks": 13}


@pytest.mark.parametrize("name", TENSORS)
def test_attention_refuses_tensors_of_two_devices(name):
    args = list(Case([1], [40], sinks=True, device=DEVICE).args())
    args[TENSORS[name]] = args[TENSORS[name]].cpu()
    with pytest.raises(RuntimeError, match=f"{name}: must be on cuda:0, is on the CPU"):
        ops.attn_paged(*args)


def test_other_ops_refuse_tensors_of_two_devices():
    x, kv = torch.zeros(2, 3, 64, device=DEVICE), torch.zeros(4, 2, 3, 16, 64, device=DEVICE)
    with pytest.raises(RuntimeError, match="slot_mapping: must be on cuda:0, is on the CPU"):
        ops.kv_append(x, x, kv, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="lse: must be on cuda:0, is on the CPU"):
        ops.merge_states(x[None], torch.zeros(1, 2, 3))
