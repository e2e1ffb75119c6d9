// CudaAttnPaged: which kernel takes which plan items, and the workspace they share.
#include <algorithm>

#include "csrc/kernels/cuda/attn_hopper.h"
#include "csrc/kernels/cuda/attn_kernels.h"
#include "csrc/kernels/cuda/launch.h"

namespace cachedattn {
namespace {

// A kernel, and the plan items it takes: those with min_rows < rows <= max_rows.
struct KernelUse {
  const char* (*launch)(const cuda::AttnLaunch& launch, int num_items, void* stream);
  int row_tile;
  int min_rows, max_rows;
};
struct KernelUses {
  KernelUse uses[2];
  int count;
};

int GroupOf(const AttnParams& p) { return p.num_q_heads / p.kv.num_kv_heads; }

// Most rows of a plan item, where no sequence has more than max_q_len.
int MaxItemRows(const AttnParams& p, int64_t max_q_len) {
  const int tile = QueryTile(GroupOf(p));
  return static_cast<int>(std::min<int64_t>(max_q_len, tile)) * GroupOf(p);
}

// The tensor core kernels read whole 16-byte chunks of rows and of angles, and rotate chunks with
// chunks.
bool FitsTensorCores(const AttnParams& p) {
  const int pairs = p.rope.rotary_dim / 2;
  const int64_t strides = p.kv.slot_stride | p.kv.kv_stride | p.kv.head_stride | p.kv.token_stride |
                          p.q_token_stride | p.out_token_stride;
  const uint64_t addresses = reinterpret_cast<uint64_t>(p.kv.data) |
                             reinterpret_cast<uint64_t>(p.q) | reinterpret_cast<uint64_t>(p.out) |
                             reinterpret_cast<uint64_t>(p.rope.lo) |
                             reinterpret_cast<uint64_t>(p.rope.hi);
  return p.kv.dtype != DType::kFloat32 && cuda::IsTensorCoreDim(p.kv.head_dim) &&
         (p.rope.interleaved || pairs % 8 == 0) && strides % 8 == 0 && addresses % 16 == 0;
}

// An item's kernel depends on its own rows alone, never on max_q_len: a sequence's output must not
// change with its batch mates. max_q_len only leaves out what would find no item.
KernelUses ChooseKernels(const AttnParams& p, int64_t max_q_len) {
  const int most = MaxItemRows(p, max_q_len);
  if (!FitsTensorCores(p)) return {{{cuda::LaunchPlain, cuda::kPlainRows, 0, most}}, 1};
  const bool whole = p.rope.rotary_dim == 0 || p.rope.rotary_dim == p.kv.head_dim;
  const int few = whole ? cuda::kMaxDecodeItemRows : 0;
  KernelUses chosen = {{}, 0};
  if (GroupOf(p) <= few) {
    chosen.uses[chosen.count++] = {cuda::LaunchDecode, cuda::kDecodeRows, 0, std::min(few, most)};
  }
  if (most > few && cuda::ComputeCapability() == 90 && cuda::HopperTakes(p)) {
    chosen.uses[chosen.count++] = {cuda::LaunchHopper, cuda::kHopperRows, few, most};
  } else if (most > few) {
    chosen.uses[chosen.count++] = {cuda::LaunchExtend, cuda::ExtendRows(p.kv.head_dim), few, most};
  }
  return chosen;
}

int RowBlocks(const KernelUse& use) { return (use.max_rows + use.row_tile - 1) / use.row_tile; }

// -1: no plan has this size.
int64_t NumItems(const AttnParams& p) {
  const int64_t words = p.plan_size - kPlanHeaderWords;
  return words >= 0 && words % kPlanItemWords == 0 ? words / kPlanItemWords : -1;
}

// Counters of finished splits.
int64_t CounterBytes(const AttnParams& p, int row_blocks) {
  return std::max<int64_t>(0, NumItems(p)) * p.kv.num_kv_heads * row_blocks * int64_t{sizeof(int)};
}

// States of splits.
int64_t PartialBytes(const AttnParams& p) {
  const int64_t tokens = MaxPartialTokens(p.num_rows, p.num_seqs, GroupOf(p));
  return tokens * p.num_q_heads * (p.kv.head_dim + 2) * int64_t{sizeof(float)};
}

}  // namespace

int64_t CudaAttnWorkspaceBytes(const AttnParams& params) {
  // Whichever kernels are chosen: the decode kernel's row blocks, and those of the smallest tile.
  constexpr int kDecodeBlocks = cuda::kMaxDecodeItemRows / cuda::kDecodeRows;
  const KernelUse smallest = {nullptr, cuda::kPlainRows, 0, MaxItemRows(params, params.num_rows)};
  return PartialBytes(params) + CounterBytes(params, kDecodeBlocks + RowBlocks(smallest));
}

const char* CudaAttnPaged(const AttnParams& params, int max_q_len, void* workspace, void* stream) {
  const int num_items = static_cast<int>(NumItems(params));
  if (num_items < 0 || (num_items == 0 && params.num_rows > 0)) {
    return "plan: was not made by attn_plan for these rows";
  }
  if (num_items == 0) return nullptr;
  const KernelUses chosen = ChooseKernels(params, max_q_len);
  int row_blocks = 0;
  for (int i = 0; i < chosen.count; ++i) row_blocks += RowBlocks(chosen.uses[i]);
  char* counters = static_cast<char*>(workspace) + PartialBytes(params);
  const char* error = cuda::ZeroMemory(counters, CounterBytes(params, row_blocks), stream);
  for (int i = 0; i < chosen.count && error == nullptr; ++i) {
    const KernelUse& use = chosen.uses[i];
    const cuda::AttnLaunch launch = {params,
                                     static_cast<float*>(workspace),
                                     reinterpret_cast<int*>(counters),
                                     RowBlocks(use),
                                     use.min_rows,
                                     use.max_rows};
    error = use.launch(launch, num_items, stream);
    counters += CounterBytes(params, RowBlocks(use));
  }
  return error;
}

}  // namespace cachedattn
