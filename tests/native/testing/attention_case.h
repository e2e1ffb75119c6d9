// A random batch for CudaAttnPaged on the emulated device, and what it should give, in float64.
//
// Every buffer has exactly the size that a call may touch: under AddressSanitizer an overrun fails.
// Places that hold no token, the outputs and the workspace are filled with NaN.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "csrc/kernels/attn_plan.h"
#include "csrc/kernels/cpu/scalar.h"
#include "csrc/kernels/params.h"

namespace cachedattn {

struct AttentionShape {
  std::vector<int> q_lens, kv_lens;
  int q_heads = 4, kv_heads = 2, head_dim = 64;
  DType dtype = DType::kBFloat16;
  int block_size = 16;
  int rotary_dim = -1;  // -1: head_dim
  bool interleaved = false;
  int window = 0;
  float softcap = 0.f;
  bool sinks = false;
  float spread = 1.f;  // standard deviation of the logits
  int q_gap = 0;       // elements between two tokens of q that belong to nobody
  uint32_t seed = 0;
};

inline std::string Describe(const AttentionShape& s) {
  std::ostringstream text;
  text << Name(s.dtype) << " heads " << s.q_heads << "/" << s.kv_heads << " dim " << s.head_dim
       << " block " << s.block_size << " rotary " << s.rotary_dim
       << (s.interleaved ? " interleaved" : "") << " window " << s.window << " softcap "
       << s.softcap << (s.sinks ? " sinks" : "") << " spread " << s.spread << " lengths";
  for (size_t b = 0; b < s.q_lens.size(); ++b) text << " " << s.q_lens[b] << "/" << s.kv_lens[b];
  return text.str();
}

// Elements of a dtype, as bytes.
class Elements {
 public:
  Elements(DType dtype, int64_t count) : dtype_(dtype), bytes_(count * SizeOf(dtype), '\xff') {}
  char* data() { return bytes_.data(); }
  float Get(int64_t i) const {
    float value = 0.f;
    WithElement(dtype_, [&](auto* element) {
      std::remove_pointer_t<decltype(element)> x;
      std::memcpy(&x, bytes_.data() + i * sizeof(x), sizeof(x));
      value = ToFloat(x);
    });
    return value;
  }
  void Set(int64_t i, float value) {
    WithElement(dtype_, [&](auto* element) {
      std::remove_pointer_t<decltype(element)> x;
      FromFloat(value, &x);
      std::memcpy(bytes_.data() + i * sizeof(x), &x, sizeof(x));
    });
  }
  float Round(float value) const {
    WithElement(dtype_, [&](auto* element) {
      std::remove_pointer_t<decltype(element)> x;
      FromFloat(value, &x);
      value = ToFloat(x);
    });
    return value;
  }

 private:
  DType dtype_;
  std::vector<char> bytes_;
};

// out [Tq, Hq, D], lse [Tq, Hq].
struct AttentionResult {
  std::vector<float> out, lse;
  bool operator==(const AttentionResult& other) const {
    return std::memcmp(out.data(), other.out.data(), out.size() * sizeof(float)) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

class AttentionCase {
 public:
  explicit AttentionCase(const AttentionShape& shape)
      : shape_(shape), kv_(shape.dtype, 0), q_(shape.dtype, 0) {
    if (shape_.rotary_dim < 0) shape_.rotary_dim = shape_.head_dim;
    for (int i = 0; i < shape_.rotary_dim / 2; ++i) {
      inv_freq_.push_back(std::pow(10000., -2. * i / shape_.rotary_dim));
    }
    std::mt19937 generator(shape_.seed);
    MakePool(&generator);
    std::normal_distribution<float> normal;
    int64_t tokens = 0;
    for (const int q_len : shape_.q_lens) tokens += q_len;
    q_ = Elements(shape_.dtype, std::max<int64_t>(0, tokens * TokenStride() - shape_.q_gap));
    for (int64_t token = 0; token < tokens; ++token) {
      for (int i = 0; i < shape_.q_heads * shape_.head_dim; ++i) {
        q_.Set(token * TokenStride() + i, normal(generator));
      }
    }
    for (int h = 0; shape_.sinks && h < shape_.q_heads; ++h) sinks_.push_back(normal(generator));
  }

  const AttentionShape& shape() const { return shape_; }

  // Sequence `b` of the batch by itself, from the same pool.
  AttentionCase Alone(int b) const {
    AttentionCase one = *this;
    one.shape_.q_lens = {shape_.q_lens[b]};
    one.shape_.kv_lens = {shape_.kv_lens[b]};
    one.table_.assign(table_.begin() + b * max_blocks_, table_.begin() + (b + 1) * max_blocks_);
    const int64_t first = FirstRow(b), count = shape_.q_lens[b] * TokenStride() - shape_.q_gap;
    one.q_ = Elements(shape_.dtype, std::max<int64_t>(0, count));
    for (int64_t i = 0; i < count; ++i) one.q_.Set(i, q_.Get(first * TokenStride() + i));
    return one;
  }

  // What the device gives. More rows than the longest sequence has are allowed for by `slack`; the
  // plan ends with `idle_items` items of zeros.
  AttentionResult Run(int slack = 0, int idle_items = 0) {
    const int num_seqs = static_cast<int>(shape_.q_lens.size());
    std::vector<int32_t> cu_q(num_seqs + 1, 0);
    std::partial_sum(shape_.q_lens.begin(), shape_.q_lens.end(), cu_q.begin() + 1);
    std::vector<int32_t> kv_lens(shape_.kv_lens.begin(), shape_.kv_lens.end());
    std::vector<int32_t> table = table_;
    AttnParams p;
    std::vector<int32_t> plan =
        MakeAttnPlan(cu_q.data(), kv_lens.data(), num_seqs, shape_.q_heads / shape_.kv_heads, 2);
    plan.resize(plan.size() + idle_items * kPlanItemWords, 0);
    const int64_t rows = cu_q.back(), width = int64_t{shape_.q_heads} * shape_.head_dim;
    Elements out(shape_.dtype, rows * width);
    AttentionResult result;
    result.lse.assign(rows * shape_.q_heads, std::numeric_limits<float>::quiet_NaN());
    p.q = q_.data();
    p.out = out.data();
    p.lse = result.lse.data();
    p.num_rows = rows;
    p.num_seqs = num_seqs;
    p.num_q_heads = shape_.q_heads;
    p.q_token_stride = TokenStride();
    p.out_token_stride = width;
    p.block_table = table.data();
    p.max_blocks = max_blocks_;
    p.kv_lens = kv_lens.data();
    p.cu_q = cu_q.data();
    p.plan = plan.data();
    p.plan_size = static_cast<int64_t>(plan.size());
    p.kv = View();
    std::vector<float> lo, hi;
    p.rope = Tables(&lo, &hi);
    p.sm_scale = Scale();
    p.softcap = shape_.softcap;
    p.window = shape_.window;
    p.sinks = shape_.sinks ? sinks_.data() : nullptr;
    const int64_t bytes = CudaAttnWorkspaceBytes(p);
    constexpr std::align_val_t kAlignment{256};
    void* workspace = ::operator new(bytes, kAlignment);
    std::memset(workspace, 0xff, bytes);
    const int max_q_len = *std::max_element(shape_.q_lens.begin(), shape_.q_lens.end());
    const char* error = CudaAttnPaged(p, max_q_len + slack, workspace, nullptr);
    ::operator delete(workspace, kAlignment);
    EXPECT_EQ(error, nullptr) << error;
    for (int64_t i = 0; i < rows * width; ++i) result.out.push_back(out.Get(i));
    return result;
  }

  // What is right, by gathering, rotating and a full softmax in float64. `rounds`: rotated q and k,
  // the weights and the result are rounded to the dtype, as the usual pipeline does.
  AttentionResult Reference(bool rounds) const {
    AttentionResult result;
    for (size_t b = 0; b < shape_.q_lens.size(); ++b) {
      for (int i = 0; i < shape_.q_lens[b]; ++i) {
        for (int h = 0; h < shape_.q_heads; ++h) ReferenceRow(b, i, h, rounds, &result);
      }
      rotated_.clear();
    }
    return result;
  }

 private:
  int64_t TokenStride() const { return shape_.q_heads * shape_.head_dim + shape_.q_gap; }
  float Scale() const { return shape_.spread / std::sqrt(static_cast<float>(shape_.head_dim)); }
  int64_t FirstRow(int b) const {
    return std::accumulate(shape_.q_lens.begin(), shape_.q_lens.begin() + b, int64_t{0});
  }

  // One of two layers of a slab, so that the strides are those of a real pool; slots in any order.
  KvView View() {
    KvView kv;
    kv.dtype = shape_.dtype;
    kv.num_slots = num_slots_;
    kv.num_kv_heads = shape_.kv_heads;
    kv.block_size = shape_.block_size;
    kv.head_dim = shape_.head_dim;
    kv.token_stride = shape_.head_dim;
    kv.head_stride = kv.token_stride * shape_.block_size;
    kv.kv_stride = kv.head_stride * shape_.kv_heads;
    kv.slot_stride = 4 * kv.kv_stride;
    kv.data = kv_.data() + 2 * kv.kv_stride * SizeOf(kv.dtype);
    return kv;
  }
  int64_t KeyIndex(int b, int h, int key) const {
    const int64_t head = int64_t{shape_.block_size} * shape_.head_dim,
                  part = head * shape_.kv_heads;
    const int64_t slot = table_[b * max_blocks_ + key / shape_.block_size];
    return slot * 4 * part + 2 * part + h * head + key % shape_.block_size * shape_.head_dim;
  }
  int64_t ValueOffset() const {
    return int64_t{shape_.kv_heads} * shape_.block_size * shape_.head_dim;
  }

  void MakePool(std::mt19937* generator) {
    max_blocks_ = 1;
    num_slots_ = 2;
    for (const int kv_len : shape_.kv_lens) {
      const int blocks = (kv_len + shape_.block_size - 1) / shape_.block_size;
      max_blocks_ = std::max(max_blocks_, blocks);
      num_slots_ += blocks;
    }
    std::vector<int32_t> slots(num_slots_);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), *generator);
    kv_ = Elements(shape_.dtype, num_slots_ * 4 * ValueOffset());
    std::normal_distribution<float> normal;
    table_.assign(shape_.kv_lens.size() * max_blocks_, -1);
    for (size_t b = 0; b < shape_.kv_lens.size(); ++b) {
      for (int key = 0; key < shape_.kv_lens[b]; ++key) {
        if (key % shape_.block_size == 0) {
          table_[b * max_blocks_ + key / shape_.block_size] = slots.back();
          slots.pop_back();
        }
        for (int h = 0; h < shape_.kv_heads; ++h) {
          for (int d = 0; d < shape_.head_dim; ++d) {
            kv_.Set(KeyIndex(b, h, key) + d, normal(*generator));
            kv_.Set(KeyIndex(b, h, key) + ValueOffset() + d, normal(*generator));
          }
        }
      }
    }
  }

  RopeTables Tables(std::vector<float>* lo, std::vector<float>* hi) const {
    RopeTables rope;
    const int pairs = static_cast<int>(inv_freq_.size());
    const int longest = *std::max_element(shape_.kv_lens.begin(), shape_.kv_lens.end());
    rope.num_hi = longest / RopeTables::kLoRows + 1;
    rope.rotary_dim = 2 * pairs;
    rope.interleaved = shape_.interleaved;
    if (pairs == 0) return rope;
    lo->resize(RopeTables::kLoRows * pairs * 2);
    hi->resize(rope.num_hi * pairs * 2);
    RopeTable(inv_freq_.data(), pairs, RopeTables::kLoRows, 1, lo->data());
    RopeTable(inv_freq_.data(), pairs, rope.num_hi, RopeTables::kLoRows, hi->data());
    rope.lo = lo->data();
    rope.hi = hi->data();
    return rope;
  }

  std::vector<double> Rotated(const Elements& x, int64_t offset, int position, bool rounds) const {
    std::vector<double> row(shape_.head_dim);
    for (int d = 0; d < shape_.head_dim; ++d) row[d] = x.Get(offset + d);
    const int pairs = shape_.rotary_dim / 2;
    for (int i = 0; i < pairs; ++i) {
      double& first = row[shape_.interleaved ? 2 * i : i];
      double& second = row[shape_.interleaved ? 2 * i + 1 : i + pairs];
      const double a = first, b = second, angle = position * inv_freq_[i];
      first = a * std::cos(angle) - b * std::sin(angle);
      second = b * std::cos(angle) + a * std::sin(angle);
    }
    for (double& value : row) value = rounds ? x.Round(static_cast<float>(value)) : value;
    return row;
  }

  // Keys of sequence b, [H][kv_len], rotated once.
  const std::vector<double>& RotatedKey(int b, int h, int key, bool rounds) const {
    const int kv_len = shape_.kv_lens[b];
    if (rotated_.empty()) {
      for (int i = 0; i < shape_.kv_heads; ++i) {
        for (int j = 0; j < kv_len; ++j) {
          rotated_.push_back(Rotated(kv_, KeyIndex(b, i, j), j, rounds));
        }
      }
    }
    return rotated_[h * kv_len + key];
  }

  void ReferenceRow(int b, int i, int head, bool rounds, AttentionResult* result) const {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const int position = shape_.kv_lens[b] - shape_.q_lens[b] + i, dim = shape_.head_dim;
    const int kv_head = head / (shape_.q_heads / shape_.kv_heads);
    const int begin = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
    const std::vector<double> q = Rotated(
        q_, (FirstRow(b) + i) * TokenStride() + int64_t{head} * dim, std::max(0, position), rounds);
    std::vector<double> logits;
    double peak = shape_.sinks ? sinks_[head] : -kInfinity;
    for (int key = begin; key <= position; ++key) {
      const std::vector<double>& k = RotatedKey(b, kv_head, key, rounds);
      double logit = Scale() * std::inner_product(q.begin(), q.end(), k.begin(), 0.);
      if (shape_.softcap > 0.f) logit = shape_.softcap * std::tanh(logit / shape_.softcap);
      logits.push_back(logit);
      peak = std::max(peak, logit);
    }
    std::vector<double> sum(dim, 0.);
    double total = shape_.sinks ? std::exp(sinks_[head] - peak) : 0.;
    for (size_t j = 0; j < logits.size(); ++j) {
      double weight = std::exp(logits[j] - peak);
      total += weight;
      if (rounds) weight = q_.Round(static_cast<float>(weight));
      const int64_t value = KeyIndex(b, kv_head, begin + static_cast<int>(j)) + ValueOffset();
      for (int d = 0; d < dim; ++d) sum[d] += weight * kv_.Get(value + d);
    }
    const bool empty = logits.empty();
    for (int d = 0; d < dim; ++d) {
      const float value = empty ? 0.f : static_cast<float>(sum[d] / total);
      result->out.push_back(rounds ? q_.Round(value) : value);
    }
    result->lse.push_back(static_cast<float>(empty ? -kInfinity : peak + std::log(total)));
  }

  AttentionShape shape_;
  Elements kv_, q_;
  std::vector<float> sinks_;
  std::vector<int32_t> table_;
  int max_blocks_ = 1;
  int64_t num_slots_ = 0;
  std::vector<double> inv_freq_;
  mutable std::vector<std::vector<double>> rotated_;
};

}  // namespace cachedattn
