#include "csrc/replay/optimum.h"

#include <algorithm>
#include <set>

#include "csrc/base/check.h"

namespace cachedattn {

namespace {

constexpr uint32_t kUnused = UINT32_MAX;

// A run of tokens that contexts hold whole or not at all. Its tokens belong to one request.
struct Node {
  uint32_t begin = 0, end = 0;  // in its request's prompt and answer
  uint32_t next_use = kUnused;  // place in the order of starts; of the walk through time
  uint32_t resident = 0;        // leading tokens that are stored
};

// The tree's nodes by request, in order, and the way from a context to them.
class Nodes {
 public:
  explicit Nodes(const TokenTree& tree) : tree_(tree), first_(tree.size() + 1) {
    std::vector<std::vector<uint32_t>> cuts(tree.size());
    for (size_t r = 0; r < tree.size(); ++r) {
      for (uint32_t tokens : {tree.shared(r), tree.prompt(r), tree.total(r)}) {
        Cut(r, tokens, &cuts);
        Cut(r, tree.NumDropped(tokens), &cuts);
      }
    }
    for (size_t r = 0; r < tree.size(); ++r) {
      first_[r] = static_cast<uint32_t>(all_.size());
      std::ranges::sort(cuts[r]);
      uint32_t begin = tree.shared(r);
      for (uint32_t cut : cuts[r]) {
        if (cut > begin) all_.push_back({.begin = begin, .end = cut});
        begin = std::max(begin, cut);
      }
    }
    first_[tree.size()] = static_cast<uint32_t>(all_.size());
  }

  Node& operator[](uint32_t node) { return all_[node]; }

  // The nodes of the context after `num_tokens` tokens of request `r`, in order.
  const std::vector<uint32_t>& Context(size_t r, uint32_t num_tokens) {
    const uint32_t dropped = tree_.NumDropped(num_tokens);
    context_.clear();
    for (auto owner = static_cast<int32_t>(r); num_tokens > dropped;
         owner = tree_.workload()[owner].parent) {
      for (uint32_t node = first_[owner + 1]; node-- > first_[owner];) {
        if (all_[node].begin < num_tokens && all_[node].begin >= dropped) context_.push_back(node);
      }
      num_tokens = std::min(num_tokens, tree_.shared(owner));
    }
    std::ranges::reverse(context_);
    return context_;
  }

 private:
  // A context of `r` ends or begins at `position`.
  void Cut(size_t r, uint32_t position, std::vector<std::vector<uint32_t>>* cuts) const {
    auto owner = static_cast<int32_t>(r);
    while (owner != kNoRequest && position <= tree_.shared(owner)) {
      owner = tree_.workload()[owner].parent;
    }
    if (owner != kNoRequest && position > 0) (*cuts)[owner].push_back(position);
  }

  const TokenTree& tree_;
  std::vector<uint32_t> first_;
  std::vector<Node> all_;
  std::vector<uint32_t> context_;
};

// Starts and completions in order; of one moment the completions first.
template <typename OnStart, typename OnCompletion>
void Walk(const Schedule& schedule, bool forward, const OnStart& on_start,
          const OnCompletion& on_completion) {
  const size_t n = schedule.by_arrival.size();
  size_t start = forward ? 0 : n, completion = forward ? 0 : n;
  if (forward) {
    while (completion < n) {
      const uint32_t done = schedule.by_completion[completion];
      if (start < n && schedule.start[schedule.by_arrival[start]] < schedule.completion[done]) {
        on_start(static_cast<uint32_t>(start++));
      } else {
        on_completion(done);
        ++completion;
      }
    }
    return;
  }
  while (start > 0 || completion > 0) {
    const bool starts =
        start > 0 &&
        (completion == 0 || schedule.start[schedule.by_arrival[start - 1]] >=
                                schedule.completion[schedule.by_completion[completion - 1]]);
    if (starts) {
      on_start(static_cast<uint32_t>(--start));
    } else {
      on_completion(schedule.by_completion[--completion]);
    }
  }
}

// When each node of a context is used next, by equal runs: next uses along a context never go down.
class NextUses {
 public:
  void Record(Nodes* nodes, const std::vector<uint32_t>& context) {
    std::vector<Run> runs;
    for (uint32_t node : context) {
      const uint32_t next = (*nodes)[node].next_use;
      if (runs.empty() || runs.back().next_use != next) runs.push_back({next, 0});
      ++runs.back().count;
    }
    uses_.push_back(std::move(runs));
  }
  // In the reverse order of the records.
  void Restore(Nodes* nodes, const std::vector<uint32_t>& context) {
    size_t i = 0;
    for (const Run& run : uses_.back()) {
      for (uint32_t left = run.count; left > 0; --left) {
        (*nodes)[context[i++]].next_use = run.next_use;
      }
    }
    CA_CHECK(i == context.size());
    uses_.pop_back();
  }

 private:
  struct Run {
    uint32_t next_use = kUnused, count = 0;
  };
  std::vector<std::vector<Run>> uses_;
};

// The stored nodes by their next use.
class Stored {
 public:
  Stored(Nodes* nodes, size_t num_requests, uint64_t capacity)
      : nodes_(nodes), by_use_(num_requests), capacity_(capacity) {}

  // All that request number `start` finds.
  std::vector<uint32_t> Take(uint32_t start) {
    by_next_.erase(start);
    return std::move(by_use_[start].nodes);
  }
  void Put(uint32_t node) {
    const uint32_t use = (*nodes_)[node].next_use;
    Bucket& bucket = by_use_[use];
    if (bucket.nodes.empty()) by_next_.insert(use);
    bucket.sorted = false;
    bucket.nodes.push_back(node);
  }
  void Drop(Node* node) {
    used_ -= node->resident;
    node->resident = 0;
  }
  void Fill(Node* node) {
    used_ += node->end - node->begin - node->resident;
    node->resident = node->end - node->begin;
  }
  void Shrink() {
    while (used_ > capacity_) {
      const uint32_t farthest = *by_next_.rbegin();
      Bucket& bucket = by_use_[farthest];
      if (!bucket.sorted) {
        std::ranges::sort(bucket.nodes, {}, [&](uint32_t node) { return (*nodes_)[node].begin; });
        bucket.sorted = true;
      }
      Node& deepest = (*nodes_)[bucket.nodes.back()];
      const auto excess =
          static_cast<uint32_t>(std::min<uint64_t>(used_ - capacity_, deepest.resident));
      deepest.resident -= excess;
      used_ -= excess;
      if (deepest.resident > 0) continue;
      bucket.nodes.pop_back();
      if (bucket.nodes.empty()) by_next_.erase(farthest);
    }
  }

 private:
  struct Bucket {
    std::vector<uint32_t> nodes;
    bool sorted = false;
  };
  Nodes* const nodes_;
  std::vector<Bucket> by_use_;
  std::set<uint32_t> by_next_;  // uses whose bucket holds something
  const uint64_t capacity_;
  uint64_t used_ = 0;
};

}  // namespace

std::vector<uint32_t> IdealTokens(const TokenTree& tree, const Schedule& schedule) {
  return OptimalTokens(tree, schedule, UINT64_MAX);
}

std::vector<uint32_t> OptimalTokens(const TokenTree& tree, const Schedule& schedule,
                                    uint64_t capacity) {
  Nodes nodes(tree);
  NextUses uses;
  // Backward: what is to come, as each event will see it.
  Walk(
      schedule, false,
      [&](uint32_t start) {
        const uint32_t r = schedule.by_arrival[start];
        const auto& context = nodes.Context(r, tree.shared(r));
        uses.Record(&nodes, context);
        for (uint32_t node : context) nodes[node].next_use = start;
      },
      [&](uint32_t r) { uses.Record(&nodes, nodes.Context(r, tree.total(r))); });
  std::vector<uint32_t> hits(tree.size());
  Stored stored(&nodes, tree.size(), capacity);
  Walk(
      schedule, true,
      [&](uint32_t start) {
        const uint32_t r = schedule.by_arrival[start];
        uses.Restore(&nodes, nodes.Context(r, tree.shared(r)));
        for (uint32_t node : stored.Take(start)) {
          hits[r] += nodes[node].resident;
          if (nodes[node].next_use == kUnused) {
            stored.Drop(&nodes[node]);
          } else {
            stored.Put(node);
          }
        }
      },
      [&](uint32_t r) {
        const auto& context = nodes.Context(r, tree.total(r));
        uses.Restore(&nodes, context);
        for (uint32_t node : context) {
          if (nodes[node].next_use == kUnused) break;
          if (nodes[node].resident == 0) stored.Put(node);
          stored.Fill(&nodes[node]);
        }
        stored.Shrink();
      });
  return hits;
}

}  // namespace cachedattn
