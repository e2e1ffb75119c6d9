// Policy: which conversation loses its deepest block next, in each tier (design D6).
//
//   kHazard     the conversation that is worth least per second of keeping it, by what was seen
//               of conversations like it (hazard.h); below what the queue wants
//   kLookahead  least recently used turn first; what waiting requests need goes last, and from the
//               queue's tail first (CachedAttention, section 3.3)
//   kLru        least recently used turn first
//   kFifo       the conversation that came first goes first
//
// One order serves all tiers: what goes first from DRAM goes first from SSD, and a tier that is
// full takes in only what goes later than what it would lose. From first to go to last:
//
//   over        ended by the user, or past its time to live; the longest over first
//   in service  only in DRAM and only with drop_in_service: the device has these copies
//   idle        by the rule above
//   promised    its user said when it returns: the latest first. With kHazard it stands among the
//               idle ones, worth one hit for the rest of that time
//   waiting     the last of the queue first (kLru, kFifo: as if it were not waiting)
//   leased      pinned by the user, until its lease ends: the one that ends first goes first
//
// Where several hold, the last of the list counts, but over outranks promised and idle alone. A
// conversation in service stands among the idle ones: as used when the turn began, and with kHazard
// ageing since the turn before. Its copies are of no use before its next turn.
//
// The policy knows conversations by handles and sees neither blocks nor bytes: the store and the
// simulator (csrc/replay) are both driven by it. Every call costs the same however many
// conversations there are; kFifo's cost the logarithm.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "csrc/base/clock.h"
#include "csrc/base/types.h"

namespace cachedattn {

enum class PolicyKind : uint8_t { kLookahead = 0, kLru = 1, kFifo = 2, kHazard = 3 };

// How a turn's answer ended, as far as the server knows.
enum class Finish : uint8_t { kOther = 0, kEndOfTurn = 1, kToolCall = 2 };

using Conversation = uint32_t;  // a handle
constexpr Conversation kNoConversation = UINT32_MAX;

struct PolicyOptions {
  PolicyKind kind = PolicyKind::kLookahead;
  // A conversation that has begun to leave a tier leaves it whole before another does (the paper).
  bool whole_conversation = false;
  bool drop_in_service = false;
  // kHazard ranks by value per token of a conversation's size: more turns find all of their
  // history, fewer tokens are found.
  bool per_token = false;
  // Keeps the order within each tenant too, at the cost of a logarithm for every change.
  bool by_tenant = false;
};

// What the end of a turn tells of its conversation.
struct TurnEnd {
  Finish finish = Finish::kOther;
  uint32_t prompt_tokens = 0;  // history included
  uint32_t answer_tokens = 0;
};

class CA_API Policy {
 public:
  // `clock` outlives the policy.
  static std::unique_ptr<Policy> Make(const PolicyOptions& options, const Clock* clock);
  virtual ~Policy() = default;

  virtual const PolicyOptions& options() const = 0;

  // The conversation called `name` of `tenant`, which lives while it is held; 0: a new one without
  // a name. One that comes back soon enough after nobody held it is remembered: its turn number and
  // that it was idle until now. `tenant` is a small number.
  virtual Conversation Hold(uint64_t name, uint32_t tenant) = 0;
  // One more holder, and one less: blocks, sequences, whoever needs the handle to mean something.
  virtual void Hold(Conversation conversation) = 0;
  virtual void Release(Conversation conversation) = 0;

  // The waiting queue, next to run first; a conversation may be in it more than once. It holds them
  // until the next call. That a conversation is back is learnt from it. One that leaves the queue
  // without a turn is idle again as it was, and teaches no more.
  virtual void SetQueue(std::span<const Conversation> waiting) = 0;
  // A turn of it runs from Begin to End (nullptr: it was given up, which teaches nothing). It is
  // held in between.
  virtual void Begin(Conversation conversation) = 0;
  virtual void End(Conversation conversation, const TurnEnd* turn) = 0;

  // Hints. They change what is kept, never what is right. Begin takes back what SetOver said.
  virtual void SetOver(Conversation conversation) = 0;
  // Over when it has been idle for so long; 0: never. Once over it stays so until Begin.
  virtual void SetTimeToLive(Conversation conversation, int64_t ns) = 0;
  // Leased for so long from now on; 0: no longer.
  virtual void SetLease(Conversation conversation, int64_t ns) = 0;
  // Back in so long from now; forgotten at the next turn, or when twice that has passed. 0: no
  // longer promised.
  virtual void SetReturn(Conversation conversation, int64_t ns) = 0;

  // Whether the conversation has a copy in `tier` that may go now. Only such ones are victims.
  virtual void SetEvictable(Conversation conversation, Tier tier, bool evictable) = 0;
  // Who loses its deepest copy in `tier` next; kNoConversation: nobody has one that may go.
  virtual Conversation Victim(Tier tier) = 0;
  // The same among the conversations of one tenant, where idle ones go by least recent use whatever
  // the kind. REQUIRES: by_tenant.
  virtual Conversation Victim(Tier tier, uint32_t tenant) = 0;
  // True: `a` goes from `tier` before `b` does, whole_conversation aside. False for equals.
  virtual bool GoesBefore(Tier tier, Conversation a, Conversation b) = 0;
  // Grows with every turn that begins or ends.
  virtual uint64_t last_use(Conversation conversation) const = 0;
  // Is it over, or waiting?
  virtual bool over(Conversation conversation) const = 0;
  virtual bool waiting(Conversation conversation) const = 0;

  // Restores the order of use of what an earlier process left behind: oldest first, once, before
  // anything else is known of them.
  virtual void Restored(Conversation conversation) = 0;

  virtual uint64_t num_conversations() const = 0;  // held
  virtual uint64_t bytes() const = 0;              // memory of the policy, roughly
  virtual void CheckInvariants() const = 0;        // aborts on a broken one
};

}  // namespace cachedattn
