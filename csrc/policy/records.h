// Records: what the policy remembers of each conversation. They lie in chunks, so that ten million
// of them grow without being moved, and are called by their places.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "csrc/base/check.h"
#include "csrc/policy/policy.h"

namespace cachedattn {

// Where a conversation stands (policy.h, "From first to go to last").
enum class Place : uint8_t { kOver, kIdle, kPromised, kWaiting, kLeased };

struct Link {
  Conversation prev = kNoConversation;
  Conversation next = kNoConversation;
};

// The links of a record: one list in each tier, and one by age. Ghosts have nothing in a tier.
constexpr uint32_t kAgeLink = kNumTiers;
constexpr uint32_t kGhostLink = 0;

// Two cache lines. The first one holds all that growing older and choosing victims touch.
struct alignas(64) Record {
  std::array<Link, kNumTiers + 1> links;
  uint64_t key = 0;  // among those of the same place, class and age: the lowest goes first
  int64_t idle_since_ns = 0;
  uint16_t turn_class = 0;  // of the last turn that ended (hazard.h)
  uint8_t bin = 0;          // of its age
  uint8_t evictable = 0;    // a bit for each tier
  uint8_t listed = 0;       // a bit for each tier: stands in a list, not among the strays
  Place place = Place::kIdle;
  uint8_t queue_mark = 0;  // not 0: waiting
  uint8_t gap = 0;         // between the last two turns, as a class
  bool live = false;
  bool ghost = false;
  bool teaches =
      false;  // idle after a turn that ended, and not known to be back: its return is news
  bool over = false;
  bool hinted = false;  // has hints
  bool ageing = false;  // in the list of its bin

  uint64_t name = 0;
  uint64_t used = 0;    // stamps: of the last use,
  uint64_t order = 0;   // of what ranks it while it is idle,
  uint64_t queued = 0;  // grows toward the queue's tail
  uint32_t tenant = 0;
  Conversation next_of_name = kNoConversation;
  uint32_t holders = 0;
  uint32_t in_service = 0;  // turns
  uint32_t turns = 0;       // that ended

  bool waiting() const { return queue_mark != 0; }
  bool busy() const { return in_service > 0 || waiting(); }
};
static_assert(sizeof(Record) == 128);

class Records {
 public:
  Record& operator[](Conversation id) { return chunks_[id / kChunk][id % kChunk]; }
  const Record& operator[](Conversation id) const { return chunks_[id / kChunk][id % kChunk]; }
  uint32_t end() const { return end_; }  // every id is below
  uint64_t bytes() const { return chunks_.size() * kChunk * sizeof(Record); }

  Conversation Take();
  void Free(Conversation id);
  void Prefetch(Conversation id) const {
    if (id != kNoConversation) __builtin_prefetch(&(*this)[id]);
  }

 private:
  static constexpr uint32_t kChunk = 512;

  std::vector<std::unique_ptr<Record[]>> chunks_;
  uint32_t end_ = 0;
  Conversation free_ = kNoConversation;
};

// A list through links[which] of its members. The first member's `prev` is not kept up: that would
// touch one more record whenever the oldest one leaves.
struct RecordList {
  Conversation head = kNoConversation;
  Conversation tail = kNoConversation;

  bool empty() const { return head == kNoConversation; }
  void PushBack(Records* records, uint32_t which, Conversation id);
  void Erase(Records* records, uint32_t which, Conversation id);
};

// Conversations by (name, tenant). Grows by one bucket at a time: no call pays for all.
class Names {
 public:
  explicit Names(Records* records) : records_(records) {}
  Conversation Find(uint64_t name, uint32_t tenant) const;
  void Insert(Conversation id);
  void Erase(Conversation id);
  uint64_t size() const { return size_; }
  uint64_t bytes() const { return buckets_.capacity() * sizeof(Conversation); }

 private:
  size_t BucketOf(uint64_t name, uint32_t tenant) const;
  size_t BucketOf(const Record& record) const { return BucketOf(record.name, record.tenant); }

  Records* const records_;
  std::vector<Conversation> buckets_{kNoConversation};
  uint64_t mask_ = 0;  // of the hash, for buckets that are not split yet in this round
  uint64_t size_ = 0;
};

}  // namespace cachedattn
