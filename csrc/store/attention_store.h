// AttentionStore: keeps conversations' KV in device memory, DRAM and SSD, and brings it back.
//
// One control thread (design D8): every call below belongs to the thread that opened the store.
// I/O and copies run elsewhere; their completions take effect in Poll, WaitLayer and Flush. Only
// WaitLayer, Drain, Flush, DropTier and Close block.
//
// A turn: NewChain (tokens -> block keys), SetQueue while it waits, Begin (pins the history,
// starts loads), then per step Reserve -> for each layer WaitLayer, compute, LayerDone -> Append,
// and at the end Commit. A cache failure is a miss, never an error (design D5).
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "csrc/base/block_key.h"
#include "csrc/base/clock.h"
#include "csrc/base/kv_layout.h"
#include "csrc/base/status.h"
#include "csrc/io/io_engine.h"
#include "csrc/policy/policy.h"
#include "csrc/store/chain.h"
#include "csrc/store/load_plan.h"

namespace cachedattn {

enum class Advice : uint8_t {
  kOver = 0,        // no turn will come; one that does takes it back
  kTimeToLive = 1,  // over when idle for so long; 0: not
  kLease = 2,       // keep it for so long; 0: no longer
  kReturn = 3,      // the next turn comes after so long
};

struct StoreOptions {
  KvLayout layout;
  Digest identity;            // of the model and everything the KV depends on but the tokens
  std::string model_name;     // for messages
  uint64_t device_bytes = 0;  // device pool; 0: the block table points at DRAM slots
  int gpu = -1;               // CUDA index of the GPU that has the device pool; -1: emulated
  uint64_t dram_bytes = 0;    // hard cap of the DRAM slab, running sequences included
  uint64_t ssd_bytes = 0;     // hard cap of the file; 0: no SSD tier
  std::string path;           // directory of the SSD tier
  // The SSD tier is encrypted under the key in this file; empty: it is not.
  std::string master_key_file;
  // What a tenant's blocks take at most of DRAM, and of SSD; 0: no limit. The slots of running
  // sequences count, but are not refused.
  uint64_t tenant_quota_bytes = 0;
  PolicyOptions policy;
  // False: a device copy goes as soon as its turn has ended and it is saved.
  bool keep_on_device = true;
  double dram_reserve = 0.1;  // share of DRAM slots kept free so that a fetch never waits
  IoKind io = IoKind::kAuto;  // kInline: of the copies, too
  uint32_t io_depth = 256;
  int64_t io_deadline_us = 2'000'000;  // an operation of the SSD tier that takes longer has failed
  uint64_t ssd_read_limit = 0;  // bytes a second that the SSD tier reads at most; 0: no limit
  const Clock* clock = &SystemClock();
  // Free slots hold NaN, so that a stray read shows: for tests. Costs memory rate.
  bool poison = false;
  std::function<void(uint64_t done, uint64_t total)> progress;  // of the scan at open
};

// How much of a chain's context is resident, in tokens, by the fastest tier that holds it.
struct CachedTokens {
  uint32_t total = 0;                // length of the longest reusable history, less `recomputed`
  uint32_t by_tier[kNumTiers] = {};  // context tokens served from each tier; sums to the
                                     // context's share of `total`
  uint32_t recomputed = 0;           // history that Begin leaves to compute again: that is sooner
};

// A timed event, for traces and tests. Times are CLOCK_MONOTONIC nanoseconds.
enum class TraceKind : uint8_t {
  // SSD -> DRAM, a group of layers of one block.
  kReadStart,
  kReadEnd,
  // DRAM -> device, one layer slice.
  kLoadStart,
  kLoadEnd,
  // Device -> DRAM, one layer slice.
  kSaveStart,
  kSaveEnd,
  // DRAM -> SSD, one block.
  kWriteStart,
  kWriteEnd,
  // WaitLayer. Compute of `layer` runs from kWaitEnd to kComputeEnd, which is LayerDone.
  kWaitStart,
  kWaitEnd,
  kComputeEnd,
  // A block became findable, for the first time or again.
  kPublish,
  // A copy made room.
  kEvict,
};
struct TraceEvent {
  int64_t time_ns = 0;
  TraceKind kind = TraceKind::kWaitStart;
  uint64_t sequence = 0;  // 0: none
  uint32_t first_layer = 0;
  uint32_t num_layers = 0;
  SlotId slot = kNoSlot;      // the source slot of a move
  Tier tier = Tier::kDevice;  // of kEvict: that of the copy
  // The first bytes of the block's key, and its tokens. 0: none, or not known yet (kSaveStart).
  uint64_t block = 0;
  uint32_t num_tokens = 0;
};

struct TierStats {
  uint32_t capacity_slots = 0, used_slots = 0, pinned_slots = 0;
  uint64_t capacity_bytes = 0;
};
// What computing has waited for: history that came from the disk, or from DRAM to the device.
struct Stalls {
  int64_t ssd_ns = 0, copy_ns = 0;
};

struct StoreStats {
  TierStats tiers[kNumTiers];
  uint64_t turns = 0, tokens_requested = 0;
  uint64_t conversations = 0, blocks = 0;  // of which something is held
  uint64_t tokens_from[kNumTiers] = {};    // reused history tokens, by serving tier
  uint64_t tokens_recomputed = 0;          // CachedTokens::recomputed
  uint64_t ssd_bytes_read = 0, ssd_bytes_written = 0;
  uint64_t bytes_loaded = 0, bytes_saved = 0;  // DRAM -> device, device -> DRAM
  Stalls stalls;
  int64_t loading_ns = 0;    // during which history of running turns was on its way
  double ssd_read_rate = 0;  // bytes a second, as measured lately; 0: not known
  uint64_t evictions[kNumTiers] = {};
  uint64_t failed_loads = 0, checksum_failures = 0, failed_saves = 0;
  // The SSD tier fails: operations with an error or a short count, and those that took longer than
  // io_deadline_us; DRAM slots that late ones hold, SSD places that rest after a failed write.
  uint64_t io_errors = 0, late_ios = 0, outages = 0;
  uint32_t quarantined_slots = 0, resting_slots = 0;
  const char* ssd_state = "none";          // "on"; "off": its blocks are misses until it is back
  std::string ssd_report = "no SSD tier";  // why, in one line
  uint32_t reads_in_flight = 0, writes_in_flight = 0, saves_waiting = 0;
  // DRAM that the GPU copies from and to at full speed; grows after open. Why it does not grow any
  // more, or empty.
  uint64_t pinned_bytes = 0;
  std::string pin_failure;
};

class Sequence;

class CA_API AttentionStore {
 public:
  // kInvalidArgument names the option; the SSD tier's errors are those of SsdTier::Open.
  static Result<std::unique_ptr<AttentionStore>> Open(const StoreOptions& options);
  virtual ~AttentionStore() = default;  // Close, errors ignored

  // Lands every save, records the counters, closes the file. Sequences must be gone. kIo: not all
  // is on the disk; a disk that does not answer holds nobody for longer than the I/O deadline, and
  // keeps its memory and the lock on the file until it does.
  virtual Status Close() = 0;

  // kClosed after Close, and in a process that was forked from the one that opened the store. Calls
  // then change nothing, and those that can say so return this.
  virtual Status CheckUsable() const = 0;

  // Key chain of tokens to come, for this store's model. `conversation`: a name that all turns of
  // one conversation share, from which the policy learns; 0: none.
  virtual std::shared_ptr<Chain> NewChain(std::string_view tenant, const Truncation& truncation,
                                          uint64_t conversation = 0) = 0;

  // Publishes the waiting queue, next to run first. Starts prefetches, protects what they need
  // (design D6). The chains are held until the next call.
  virtual void SetQueue(std::span<const std::shared_ptr<Chain>> waiting) = 0;

  // What the user knows of a conversation, by its name. Advice: it changes what is kept longest,
  // and is forgotten with the conversation. `ns` counts from now on.
  virtual void Advise(std::string_view tenant, uint64_t conversation, Advice advice,
                      int64_t ns = 0) = 0;

  // With a GPU: the stream (cudaStream_t) that computes from now on. WaitLayer then makes it wait,
  // not the caller, and what LayerDone and Append report need only have been started on it.
  virtual void UseStream(void* stream) = 0;

  virtual CachedTokens Lookup(const Chain& chain) = 0;

  // Starts a turn over `chain`: pins its longest reusable history (at most `max_history` tokens,
  // and always less than the whole chain, so that one token is left to compute) and starts the
  // loads. The sequence appends to the chain. kExhausted when the pool cannot hold it now;
  // nothing is changed then. With a `cost`, the sequence is left to compute again what of the
  // history would come later by loading it, by the rates measured so far (design D7).
  virtual Result<std::unique_ptr<Sequence>> Begin(std::shared_ptr<Chain> chain,
                                                  uint32_t max_history,
                                                  const ComputeCost& cost = {}) = 0;

  // Lets finished I/O take effect, starts what is due. Never blocks.
  virtual void Poll() = 0;

  // Waits until every save and write that is under way has ended. False: none was.
  virtual bool Drain() = 0;
  // The same, and writes what DRAM alone has to the SSD, as far as it is worth a place there.
  virtual void Flush() = 0;

  // Drops every copy in `tier` that nothing uses; kDram lands unsaved blocks on SSD first.
  virtual void DropTier(Tier tier) = 0;

  // Drops the tenant's key and everything of the tenant in every tier: what the SSD holds of it
  // cannot be decrypted any more. False: there was no key. kInvalidArgument: the store is not
  // encrypted; kBusy: the tenant has running sequences; kIo: the key could not be dropped.
  virtual Result<bool> EraseTenant(std::string_view tenant) = 0;

  virtual StoreStats stats() const = 0;
  // Slots that count for `tenant`, by tier.
  virtual std::array<uint32_t, kNumTiers> TenantUsage(std::string_view tenant) const = 0;
  virtual const std::string& io_report() const = 0;  // engine chosen, and why
  virtual void EnableTrace(bool on) = 0;             // clears the trace
  virtual std::vector<TraceEvent> TakeTrace() = 0;
  virtual void CheckInvariants() const = 0;  // aborts on a broken one

  // The pool that block tables index: slot 0 layer 0 of it, and the distances, in bytes.
  struct PoolView {
    std::byte* base;
    uint32_t num_slots;
    uint64_t slot_stride, layer_stride;
    int gpu;  // CUDA index of the GPU whose memory it is; -1: this process
  };
  virtual PoolView pool() const = 0;
  virtual const KvLayout& layout() const = 0;
};

// A running turn: the context as a list of blocks, and the right to append to it.
//
// Begin may leave a part of the history to compute again while what follows it is loaded. Until
// that part is appended, the context is what comes before; then it is the whole history.
// Destroying it without Commit drops what was not yet saved.
class CA_API Sequence {
 public:
  virtual ~Sequence() = default;

  virtual uint64_t id() const = 0;
  // Of all WaitLayer so far. With a GPU, where computing waits by itself, as far as is known now.
  virtual Stalls stalls() const = 0;
  // History tokens found by Begin (absolute, dropped ones included), and where they came from.
  virtual const CachedTokens& cached() const = 0;
  // Tokens of the chain whose KV has been computed or loaded, dropped ones included.
  virtual uint32_t num_computed_tokens() const = 0;
  // Tokens in the context now; the next token's position is this.
  virtual uint32_t context_len() const = 0;
  // Slots of the context's blocks in order, the reserved ones included.
  virtual std::span<const int32_t> block_table() const = 0;
  // Tokens that fit before the window is full; 0: call Truncate first. UINT32_MAX: no window. While
  // history is computed again: what is left of it.
  virtual uint32_t room() const = 0;

  // Makes sure that slots for `num_tokens` more tokens are in the block table. kExhausted: the
  // pool is full of running sequences; nothing is changed. REQUIRES: num_tokens <= room().
  virtual Status Reserve(uint32_t num_tokens) = 0;

  // True while some layer has not landed; WaitLayer need not be called when false.
  virtual bool loading() const = 0;
  // Until every layer has landed, by the rates measured so far; infinity: they are not known. 0
  // when a part cannot be loaded.
  virtual double load_left_s() const = 0;
  // Waits until layer `layer` of the context is in its slots; with a GPU until it will be for
  // computing that is started from now on. kCorrupt or kIo when some of the history cannot be: the
  // failed block is no longer findable; drop this step and the sequence, and begin again.
  virtual Status WaitLayer(uint32_t layer) = 0;
  // Layer `layer` of this step's `num_tokens` new tokens is in the slots: its save may start.
  virtual void LayerDone(uint32_t layer, uint32_t num_tokens) = 0;

  // The step is done: these tokens (the next of the chain, or newly generated ones) have their KV
  // in the slots. Full blocks become findable and their saves start. REQUIRES: tokens.size() <=
  // room().
  virtual void Append(std::span<const TokenId> tokens) = 0;

  // Cuts the context by the chain's truncation rule. REQUIRES: room() == 0.
  virtual void Truncate() = 0;

  // Ends the turn: the part-filled tail becomes findable too, pins are dropped. `finish` is for the
  // policy.
  virtual void Commit(Finish finish = Finish::kOther) = 0;
};

// Live stores by handle, for torch ops that receive a store as an int64 (design D10).
CA_API int64_t RegisterStore(AttentionStore* store);
CA_API void UnregisterStore(int64_t handle);
CA_API AttentionStore* FindStore(int64_t handle);  // nullptr: unknown or closed

}  // namespace cachedattn
