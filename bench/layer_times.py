"""Times of one batch, layer by layer: history loaded under computation, new KV saved under it.

A model of two streams beside the one that computes (CachedAttention, section 3.2). Layers are
alike; a copy stream does one layer after the other at the rate of the link, and a layer's
computation begins when the one before it has ended and its history is there. It knows nothing of
launch overheads, of bandwidth that copies take from kernels, or of batches that are not full.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A model on a machine. LLaMA-13B on one A100-80GB with PCIe Gen4, as the paper has it."""

    layers: int = 40
    token_bytes: int = 819_200  # K and V of all layers, 2 bytes a value
    parameters: float = 13e9
    flops: float = 0.5 * 312e12  # half of what the GPU can do at best
    memory: float = 0.8 * 2.0e12  # bytes a second, four fifths of the best
    link: float = 26e9  # bytes a second between host and device, each way (papers: 5 GB in 192 ms)

    def load_s(self, tokens: int) -> float:
        """Copying the KV of `tokens`."""
        return tokens * self.token_bytes / self.link

    def prefill_s(self, tokens: int) -> float:
        """Computing `tokens`; attention itself is left out, it is a few percent at 1K."""
        return tokens * 2 * self.parameters / self.flops

    def decode_s(self, batch: int, context: int) -> float:
        """One token for each sequence of the batch: weights and KV are read once."""
        return (2 * self.parameters + batch * context * self.token_bytes) / self.memory


def with_preload(machine: Machine, batch: int, history: int, new: int, buffer: int | None) -> float:
    """Seconds until `new` tokens of each sequence are computed over a history in DRAM.

    buffer: layers whose history lies on the device before the batch begins; None: nothing is
    computed before all of it has been loaded.
    """
    load = machine.load_s(batch * history) / machine.layers
    compute = machine.prefill_s(batch * new) / machine.layers
    if buffer is None:
        return machine.layers * (load + compute)
    end = 0.0
    for layer in range(machine.layers):
        there = max(0, layer + 1 - buffer) * load
        end = max(end, there) + compute
    return end


def two_streams(layers: int, load_s: float, compute_s: float, buffer: int | None) -> float:
    """`with_preload` where loading all of the history takes `load_s`, and computing the new tokens
    `compute_s`: a machine with one token of each."""
    machine = Machine(
        layers=layers, token_bytes=1, parameters=0.5, flops=1 / compute_s, link=1 / load_s
    )
    return with_preload(machine, 1, 1, 1, buffer)


def with_saving(machine: Machine, batch: int, prompt: int, steps: int, asynchronous: bool) -> float:
    """Seconds for a prompt and `steps` tokens of each sequence, until the next batch has room.

    A layer's KV of the prompt can leave when the layer is computed, that of a step when the step
    is. What has not left at the end waits in a buffer of its own, so only more than the last step's
    would hold up the next batch.
    """
    compute = machine.prefill_s(batch * prompt)
    layer_save = machine.load_s(batch * prompt) / machine.layers
    step_save = machine.load_s(batch)
    decode = [machine.decode_s(batch, prompt + step) for step in range(steps)]
    if not asynchronous:
        return compute + sum(decode) + machine.layers * layer_save + steps * step_save
    saved = 0.0
    for layer in range(machine.layers):
        saved = max(saved, compute * (layer + 1) / machine.layers) + layer_save
    end = compute
    for seconds in decode[:-1]:
        end += seconds
        saved = max(saved, end) + step_save
    return max(end + decode[-1], saved)
