#include "csrc/replay/replay.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <list>
#include <memory>
#include <sstream>
#include <unordered_map>

#include "csrc/replay/trace_source.h"
#include "csrc/store/open_store.h"

namespace cachedattn {

namespace {

// The smallest blocks whose payload fills its page: capacities in bytes and the bytes of tokens
// then differ by the header page alone, which is a half.
constexpr KvLayout kLayout{1, 1, 64, TokenTree::kBlockSize, DType::kBFloat16};
constexpr size_t kProgressEvery = 256;  // requests

int64_t Ns(double seconds) { return std::llround(1e9 * seconds); }

// Requests that wait, next to run first.
class WaitingQueue {
 public:
  void Join(std::shared_ptr<Chain> chain) { chains_.push_back(std::move(chain)); }
  // It is the first, or one of few before it that found no room.
  void Leave(const std::shared_ptr<Chain>& chain) {
    const auto first = chains_.begin() + static_cast<ptrdiff_t>(first_);
    const auto it = std::find(first, chains_.end(), chain);
    std::rotate(first, it, it + 1);
    chains_[first_].reset();
    if (++first_ < 1024 || 2 * first_ < chains_.size()) return;
    chains_.erase(chains_.begin(), chains_.begin() + first_);
    first_ = 0;
  }
  std::span<const std::shared_ptr<Chain>> waiting() const {
    return std::span(chains_).subspan(first_);
  }

 private:
  std::vector<std::shared_ptr<Chain>> chains_;
  size_t first_ = 0;
};

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
  Status Compute(uint32_t r);
  void PollDevices();
  void NoteLoads();
  int64_t NextDeviceNs() const {
    return std::min(ssd_ ? ssd_->next_ns() : kNever, copy_->next_ns());
  }
  int64_t NextScheduledNs() const {
    const double next_s = source_->next_s();
    return next_s == kNoTime ? kNever : Ns(next_s);
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
  store.keep_on_device = false;
  store.dram_reserve = options_.dram_reserve;
  store.dram_bytes = slots(options_.dram_bytes) * kLayout.host_slot_bytes();
  // Twice what can run: turns that ended may still wait to be saved.
  const uint64_t context = kLayout.num_blocks(source_->max_context()) + 1;
  store.device_bytes =
      2 * (source_->max_running() + uint64_t{1}) * context * kLayout.payload_bytes();
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
  if (!Begin(r, UINT32_MAX)) no_room_.push_back(r);
}

bool Player::Begin(uint32_t r, uint32_t max_history) {
  Live& live = live_[r];
  auto begun = store_->Begin(live.chain, max_history);
  if (!begun.ok()) {
    CA_CHECK(begun.status().code() == Code::kExhausted);
    return false;
  }
  live.sequence = std::move(begun.value());
  queue_.Leave(live.chain);
  queue_changed_ = true;
  const CachedTokens& cached = live.sequence->cached();
  live.result.dram_tokens = cached.by_tier[static_cast<int>(Tier::kDevice)] +
                            cached.by_tier[static_cast<int>(Tier::kDram)];
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

// The turn's new tokens, prompt and answer, in as many steps as the window asks for.
Status Player::Compute(uint32_t r) {
  Sequence& sequence = *live_[r].sequence;
  const uint32_t total = live_[r].turn.total;
  while (sequence.num_computed_tokens() < total) {
    if (sequence.room() == 0) sequence.Truncate();
    const uint32_t first = sequence.num_computed_tokens();
    const uint32_t tokens = std::min(total - first, sequence.room());
    if (Status status = sequence.Reserve(tokens); !status.ok()) return status;
    sequence.LayerDone(0, tokens);
    sequence.Append(source_->Tokens(r, first, first + tokens));
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
void Player::PollDevices() {
  do {
    store_->Poll();
  } while (NextDeviceNs() <= clock_.NowNs());
  NoteLoads();
  std::erase_if(no_room_, [&](uint32_t r) { return Begin(r, UINT32_MAX); });
  std::erase_if(due_, [&](uint32_t r) { return End(r); });
}

// All that the schedule has for this moment.
void Player::PlayMoment(int64_t now_ns) {
  events_.clear();
  while (NextScheduledNs() <= now_ns) events_.push_back(source_->Next());
  std::ranges::stable_sort(events_, {}, &Event::kind);
  for (const Event& event : events_) {
    switch (event.kind) {
      case EventKind::kCompletion:
        if (!End(event.request)) due_.push_back(event.request);
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
  if (std::exchange(queue_changed_, false)) store_->SetQueue(queue_.waiting());
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
  totals_.dram_evictions = stats.evictions[static_cast<int>(Tier::kDram)];
  totals_.ssd_evictions = stats.evictions[static_cast<int>(Tier::kSsd)];
  return totals_;
}

}  // namespace

Status SetPolicy(const std::string& name, PolicyOptions* policy, SessionHints* hints) {
  constexpr std::pair<const char*, PolicyKind> kKinds[] = {{"lookahead", PolicyKind::kLookahead},
                                                           {"hazard", PolicyKind::kHazard},
                                                           {"lru", PolicyKind::kLru},
                                                           {"fifo", PolicyKind::kFifo}};
  const std::pair<const char*, bool*> extras[] = {{"ended", &hints->over},
                                                  {"in-service", &policy->drop_in_service},
                                                  {"whole", &policy->whole_conversation},
                                                  {"per-token", &policy->per_token}};
  const auto bad = [](const std::string& word, const char* choices) {
    return Status(Code::kInvalidArgument, "policy: '" + word + "' is none of " + choices);
  };
  std::stringstream words(name);
  std::string word;
  std::getline(words, word, '+');
  const auto kind = std::ranges::find(kKinds, word, [](const auto& k) { return k.first; });
  if (kind == std::end(kKinds)) return bad(word, "lookahead, hazard, lru, fifo");
  policy->kind = kind->second;
  while (std::getline(words, word, '+')) {
    if (word.starts_with("ttl=")) {
      uint32_t seconds = 0;
      const auto [end, error] =
          std::from_chars(word.data() + 4, word.data() + word.size(), seconds);
      if (error != std::errc() || end != word.data() + word.size() || seconds == 0) {
        return Status(Code::kInvalidArgument, "policy: '+" + word + "' is no number of seconds");
      }
      hints->time_to_live_ns = int64_t{seconds} * 1'000'000'000;
      continue;
    }
    const auto extra = std::ranges::find(extras, word, [](const auto& e) { return e.first; });
    if (extra == std::end(extras)) {
      return bad("+" + word, "+ended, +ttl=SECONDS, +in-service, +whole, +per-token");
    }
    *extra->second = true;
  }
  return Status();
}

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
  static_cast<ReplayTotals&>(result) = totals.value();
  for (const TurnResult& turn : source.results()) {
    result.hit_tokens.push_back(turn.hit_tokens);
    result.dram_tokens.push_back(turn.dram_tokens);
    result.load_s.push_back(turn.load_s);
  }
  return result;
}

}  // namespace cachedattn
