#include "csrc/replay/replay.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <unordered_map>

#include "csrc/replay/trace_source.h"
#include "csrc/replay/waiting_queue.h"
#include "csrc/store/open_store.h"

namespace cachedattn {

namespace {

// The smallest blocks whose payload fills its page: capacities in bytes and the bytes of tokens
// then differ by the header page alone, which is a half.
constexpr KvLayout kLayout{1, 1, 64, TokenTree::kBlockSize, DType::kBFloat16};
constexpr size_t kProgressEvery = 256;  // requests

int64_t Ns(double seconds) { return std::llround(1e9 * seconds); }

class Player {
 public:
  Player(Source* source, const ReplayOptions& options) : source_(source), options_(options) {}

  Status Open();
  Result<ReplayTotals> Run();

 private:
  // A request from its arrival to its end.
  struct Live {
    Turn turn;
    std::shared_ptr<Chain> chain;
    std::unique_ptr<Sequence> sequence;
    int64_t start_ns = 0;
    TurnResult result;
  };
  // A session from its first arrival to the end of its last turn: the chain of the turn that ended
  // last, and which one that was.
  struct Session {
    std::shared_ptr<Chain> chain;
    int32_t last = kNoRequest;
    uint32_t turns = 0;  // that have arrived and not ended
    bool over = false;   // no other will arrive
  };

  void Arrive(uint32_t r);
  std::shared_ptr<Chain> ChainOf(uint32_t r, Session* session);
  void Start(uint32_t r);
  bool Begin(uint32_t r, uint32_t max_history);
  bool End(uint32_t r);
  uint32_t StepEnd(uint32_t r, uint32_t first) const;
  Status ReserveStep(uint32_t r, uint32_t* num_tokens);
  Status Compute(uint32_t r);
  void Settle();
  void PollDevices();
  void BeginWaiting();
  void NoteLoads();
  int64_t NextDeviceNs() const {
    return std::min(ssd_ ? ssd_->next_ns() : kNever, copy_->next_ns());
  }
  int64_t NextScheduledNs() const {
    const double next_s = source_->next_s();
    return next_s == kNoTime ? kNever : Ns(next_s);
  }
  void PublishQueue() {
    if (std::exchange(queue_changed_, false)) store_->SetQueue(queue_.waiting());
  }
  void PlayMoment(int64_t now_ns);
  bool Report(uint64_t every);

  static uint64_t NameOf(const Turn& turn) { return turn.session + 1; }

  Source* const source_;
  const ReplayOptions& options_;
  VirtualClock clock_;
  ModelSsd* ssd_ = nullptr;  // of the store; nullptr: no SSD tier
  ModelCopy* copy_ = nullptr;
  std::unique_ptr<AttentionStore> store_;

  SessionHints hints_;

  std::vector<Live> live_;  // by request
  std::unordered_map<uint64_t, Session> sessions_;
  std::vector<Event> events_;  // of this moment
  WaitingQueue queue_;
  bool queue_changed_ = false;
  std::list<uint32_t> no_room_;  // started, but there was no room for their history
  std::list<uint32_t> loading_;  // their history is on its way
  std::list<uint32_t> due_;      // their completion has come, but not all of their history
  uint64_t num_arrived_ = 0, num_ended_ = 0, num_reported_ = 0;
  ReplayTotals totals_;
};

Status Player::Open() {
  const uint64_t token_bytes = options_.token_bytes * source_->granularity();
  const uint64_t block_bytes = token_bytes * TokenTree::kBlockSize;
  const auto slots = [&](uint64_t bytes) {
    return std::min<uint64_t>(bytes / block_bytes, 1 << 30);
  };
  if (slots(options_.dram_bytes) == 0) {
    return Status(Code::kInvalidArgument, "dram: " + std::to_string(options_.dram_bytes) +
                                              " bytes hold no block of " +
                                              std::to_string(block_bytes));
  }
  StoreOptions store;
  if (Status status = SetPolicy(options_.policy, &store.policy, &hints_); !status.ok())
    return status;
  store.layout = kLayout;
  store.keep_on_device = options_.device_bytes != 0;
  store.dram_reserve = options_.dram_reserve;
  store.dram_bytes = slots(options_.dram_bytes) * kLayout.host_slot_bytes();
  // Twice what can run: turns that ended may still wait to be saved.
  const uint64_t context = kLayout.num_blocks(source_->max_context()) + 1;
  const uint64_t device_slots = store.keep_on_device
                                    ? slots(options_.device_bytes)
                                    : 2 * (source_->max_running() + uint64_t{1}) * context;
  store.device_bytes = device_slots * kLayout.payload_bytes();
  store.clock = &clock_;
  std::unique_ptr<ModelSsd> ssd;
  if (options_.ssd_bytes != 0) {
    ssd = std::make_unique<ModelSsd>(options_.ssd, static_cast<uint32_t>(slots(options_.ssd_bytes)),
                                     token_bytes, &clock_);
  }
  auto copy = std::make_unique<ModelCopy>(options_.copy_bytes_s, block_bytes, &clock_);
  ssd_ = ssd.get();
  copy_ = copy.get();
  auto opened = OpenStoreOn(store, std::move(ssd), std::move(copy));
  if (!opened.ok()) return opened.status();
  store_ = std::move(opened.value());
  if (options_.events) store_->EnableTrace(true);
  return Status();
}

// A turn that goes on where the session's last one ended extends that one's chain.
std::shared_ptr<Chain> Player::ChainOf(uint32_t r, Session* session) {
  const Turn& turn = live_[r].turn;
  const bool goes_on = session->chain != nullptr && session->last == turn.goes_on_from;
  std::shared_ptr<Chain> chain = goes_on
                                     ? std::move(session->chain)
                                     : store_->NewChain("", source_->truncation(), NameOf(turn));
  chain->Append(source_->Tokens(r, chain->num_tokens(), turn.prompt));
  session->chain.reset();
  return chain;
}

void Player::Arrive(uint32_t r) {
  if (r >= live_.size()) live_.resize(r + 1);
  const Turn turn = live_[r].turn = source_->turn(r);
  Session& session = sessions_[turn.session];
  ++session.turns;
  session.over = session.over || turn.last;
  live_[r].chain = ChainOf(r, &session);
  queue_.Join(live_[r].chain);
  queue_changed_ = true;
  ++num_arrived_;
}

void Player::Start(uint32_t r) {
  if (!no_room_.empty() || !Begin(r, UINT32_MAX)) no_room_.push_back(r);
}

bool Player::Begin(uint32_t r, uint32_t max_history) {
  Live& live = live_[r];
  auto begun = store_->Begin(live.chain, max_history);
  if (!begun.ok()) {
    CA_CHECK(begun.status().code() == Code::kExhausted);
    return false;
  }
  live.sequence = std::move(begun.value());
  if (uint32_t tokens = 0; !ReserveStep(r, &tokens).ok()) {
    live.sequence.reset();
    return false;
  }
  queue_.Leave(live.chain);
  queue_changed_ = true;
  const CachedTokens& cached = live.sequence->cached();
  live.result.device_tokens = cached.by_tier[static_cast<int>(Tier::kDevice)];
  live.result.dram_tokens =
      live.result.device_tokens + cached.by_tier[static_cast<int>(Tier::kDram)];
  live.result.hit_tokens = live.result.dram_tokens + cached.by_tier[static_cast<int>(Tier::kSsd)];
  if (live.sequence->loading()) loading_.push_back(r);
  return true;
}

// Looks which histories are there by now.
void Player::NoteLoads() {
  std::erase_if(loading_, [&](uint32_t r) {
    if (live_[r].sequence->loading()) return false;
    live_[r].result.load_s = 1e-9 * static_cast<double>(clock_.NowNs() - live_[r].start_ns);
    return true;
  });
}

// Where the step ends that begins with token `first`: a prompt is one step; of an answer's tokens
// the store sees those that take a block's place and those that fill it.
uint32_t Player::StepEnd(uint32_t r, uint32_t first) const {
  const Turn& turn = live_[r].turn;
  if (first < turn.prompt) return turn.prompt;
  constexpr uint32_t kSize = TokenTree::kBlockSize;
  return std::min(turn.total, first % kSize == 0 ? first + 1 : first / kSize * kSize + kSize);
}

// Slots for the next step's tokens, of which there are `num_tokens`.
Status Player::ReserveStep(uint32_t r, uint32_t* num_tokens) {
  Sequence& sequence = *live_[r].sequence;
  if (sequence.room() == 0) {
    sequence.Truncate();
    clock_.MoveTo(clock_.NowNs() + 1);  // what is cut off first was over first
  }
  const uint32_t first = sequence.num_computed_tokens();
  *num_tokens = std::min(StepEnd(r, first) - first, sequence.room());
  return sequence.Reserve(*num_tokens);
}

// The turn's new tokens. Between steps, what takes no time takes effect.
Status Player::Compute(uint32_t r) {
  Sequence& sequence = *live_[r].sequence;
  const uint32_t total = live_[r].turn.total;
  while (sequence.num_computed_tokens() < total) {
    uint32_t tokens = 0;
    if (Status status = ReserveStep(r, &tokens); !status.ok()) return status;
    const uint32_t first = sequence.num_computed_tokens();
    sequence.LayerDone(0, tokens);
    sequence.Append(source_->Tokens(r, first, first + tokens));
    if (first + tokens < total) Settle();  // the last one ends with the turn
  }
  return Status();
}

// False: not yet.
bool Player::End(uint32_t r) {
  Live& live = live_[r];
  if (live.sequence == nullptr) {
    if (!Begin(r, 0)) return false;
    no_room_.remove(r);
    ++totals_.without_history;
  }
  if (live.sequence->loading()) return false;
  const Status status = Compute(r);
  if (!status.ok()) {
    CA_CHECK(status.code() == Code::kExhausted);
    if (NextDeviceNs() != kNever) return false;  // what is under way makes room
    ++totals_.not_saved;
    live.sequence.reset();
  } else {
    live.sequence->Commit(live.turn.finish);
  }
  const auto session = sessions_.find(live.turn.session);
  if (--session->second.turns == 0 && session->second.over) {
    if (hints_.over) store_->Advise("", NameOf(live.turn), Advice::kOver);
    sessions_.erase(session);
  } else if (status.ok()) {
    session->second.chain = std::move(live.chain);
    session->second.last = static_cast<int32_t>(r);
    if (hints_.time_to_live_ns > 0) {
      store_->Advise("", NameOf(live.turn), Advice::kTimeToLive, hints_.time_to_live_ns);
    }
  }
  source_->End(r, std::exchange(live, Live()).result);
  ++num_ended_;
  return true;
}

// Lets what has ended by now take effect, also what that starts and what takes no time.
void Player::Settle() {
  do {
    store_->Poll();
  } while (NextDeviceNs() <= clock_.NowNs());
}

// Those that had no room, in their order. What their histories push out is written first, which
// may take no time.
void Player::BeginWaiting() {
  while (!no_room_.empty()) {
    const uint64_t written = ssd_ ? ssd_->bytes_written() : 0;
    const bool begun = Begin(no_room_.front(), UINT32_MAX);
    if (begun) no_room_.pop_front();
    PublishQueue();
    Settle();
    const bool more_room = ssd_ && ssd_->bytes_written() > written && NextDeviceNs() == kNever;
    if (!begun && !more_room) return;
  }
}

void Player::PollDevices() {
  Settle();
  BeginWaiting();
  NoteLoads();
  std::erase_if(due_, [&](uint32_t r) { return End(r); });
}

// All that the schedule has for this moment.
void Player::PlayMoment(int64_t now_ns) {
  events_.clear();
  while (NextScheduledNs() <= now_ns) events_.push_back(source_->Next());
  std::ranges::stable_sort(events_, {}, &Event::kind);
  EventKind last = EventKind::kCompletion;
  for (const Event& event : events_) {
    if (std::exchange(last, event.kind) != event.kind) PublishQueue();
    switch (event.kind) {
      case EventKind::kCompletion:
        if (!End(event.request)) due_.push_back(event.request);
        Settle();
        break;
      case EventKind::kArrival:
        Arrive(event.request);
        break;
      case EventKind::kStart:
        live_[event.request].start_ns = Ns(event.time_s);
        Start(event.request);
        break;
    }
  }
  PublishQueue();
  PollDevices();
}

// False: the replay is given up.
bool Player::Report(uint64_t every) {
  if (!options_.progress || num_ended_ < num_reported_ + every) return true;
  num_reported_ = num_ended_;
  const StoreStats stats = store_->stats();
  return options_.progress({.ended = num_ended_,
                            .sessions = sessions_.size(),
                            .conversations = stats.conversations,
                            .blocks = stats.blocks,
                            .evictions = stats.evictions[static_cast<int>(Tier::kDram)] +
                                         stats.evictions[static_cast<int>(Tier::kSsd)]});
}

Result<ReplayTotals> Player::Run() {
  for (;;) {
    const int64_t scheduled_ns = NextScheduledNs(), device_ns = NextDeviceNs();
    if (std::min(scheduled_ns, device_ns) == kNever) break;
    clock_.MoveTo(std::min(scheduled_ns, device_ns));
    if (device_ns <= scheduled_ns) {
      PollDevices();
    } else {
      PlayMoment(scheduled_ns);
    }
    if (!Report(kProgressEvery)) return Status(Code::kClosed, "the replay was given up");
  }
  if (!Report(1)) return Status(Code::kClosed, "the replay was given up");
  CA_CHECK(num_ended_ == num_arrived_);
  const StoreStats stats = store_->stats();
  totals_.ssd_bytes_read = stats.ssd_bytes_read;
  totals_.ssd_bytes_written = stats.ssd_bytes_written;
  totals_.device_evictions = stats.evictions[static_cast<int>(Tier::kDevice)];
  totals_.dram_evictions = stats.evictions[static_cast<int>(Tier::kDram)];
  totals_.ssd_evictions = stats.evictions[static_cast<int>(Tier::kSsd)];
  totals_.events = store_->TakeTrace();
  return std::move(totals_);
}

}  // namespace

Result<ReplayTotals> Replay(Source* source, const ReplayOptions& options) {
  Player player(source, options);
  if (Status status = player.Open(); !status.ok()) return status;
  return player.Run();
}

Result<ReplayResult> Replay(const TokenTree& tree, const Schedule& schedule,
                            const ReplayOptions& options) {
  TraceSource source(tree, schedule);
  auto totals = Replay(&source, options);
  if (!totals.ok()) return totals.status();
  ReplayResult result;
  static_cast<ReplayTotals&>(result) = std::move(totals.value());
  for (const TurnResult& turn : source.results()) {
    result.hit_tokens.push_back(turn.hit_tokens);
    result.dram_tokens.push_back(turn.dram_tokens);
    result.device_tokens.push_back(turn.device_tokens);
    result.load_s.push_back(turn.load_s);
  }
  return result;
}

}  // namespace cachedattn
