#include "csrc/replay/replay.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <list>
#include <memory>
#include <sstream>

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
  Player(const TokenTree& tree, const Schedule& schedule, const ReplayOptions& options);

  Status Open();
  Result<ReplayResult> Run();

 private:
  // A request from its arrival to its end.
  struct Turn {
    std::shared_ptr<Chain> chain;
    std::unique_ptr<Sequence> sequence;
  };

  uint64_t NameOf(uint32_t r) const { return uint64_t{workload_[r].session} + 1; }
  void Arrive(uint32_t r);
  std::shared_ptr<Chain> ChainOf(uint32_t r);
  void Start(uint32_t r);
  bool Begin(uint32_t r, uint32_t max_history);
  bool End(uint32_t r);
  Status Compute(uint32_t r);
  void PollDevices();
  void NoteLoads();
  int64_t NextDeviceNs() const {
    return std::min(ssd_ ? ssd_->next_ns() : kNever, copy_->next_ns());
  }
  void PlayMoment(int64_t now_ns);

  const TokenTree& tree_;
  const Workload& workload_;
  const Schedule& schedule_;
  const ReplayOptions& options_;
  VirtualClock clock_;
  ModelSsd* ssd_ = nullptr;  // of the store; nullptr: no SSD tier
  ModelCopy* copy_ = nullptr;
  std::unique_ptr<AttentionStore> store_;

  SessionHints hints_;

  std::vector<Turn> turns_;
  // By session: the chain of its last turn that has ended, which turn that was, and how many are to
  // come.
  struct Session {
    std::shared_ptr<Chain> chain;
    int32_t last = kNoRequest;
    uint32_t turns_left = 0;
  };
  std::vector<Session> sessions_;
  WaitingQueue queue_;
  bool queue_changed_ = false;
  std::list<uint32_t> no_room_;  // started, but there was no room for their history
  std::list<uint32_t> loading_;  // their history is on its way
  std::list<uint32_t> due_;      // their completion has come, but not all of their history
  size_t next_arrival_ = 0, next_start_ = 0, next_completion_ = 0, num_ended_ = 0;
  ReplayResult result_;
};

Player::Player(const TokenTree& tree, const Schedule& schedule, const ReplayOptions& options)
    : tree_(tree),
      workload_(tree.workload()),
      schedule_(schedule),
      options_(options),
      turns_(tree.size()),
      sessions_(tree.size()) {
  for (const Request& request : workload_) ++sessions_[request.session].turns_left;
  result_.hit_tokens.resize(tree.size());
  result_.dram_tokens.resize(tree.size());
  result_.load_s.resize(tree.size());
}

// The most requests that run at one time.
uint32_t MaxRunning(const Schedule& schedule) {
  uint32_t most = 0, running = 0;
  size_t completed = 0;
  for (uint32_t r : schedule.by_arrival) {
    for (; schedule.completion[schedule.by_completion[completed]] <= schedule.start[r];
         ++completed) {
      --running;
    }
    most = std::max(most, ++running);
  }
  return most;
}

Status Player::Open() {
  const uint64_t token_bytes = options_.token_bytes * tree_.granularity();
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
  const uint64_t context = kLayout.num_blocks(tree_.max_context()) + 1;
  store.device_bytes = 2 * (MaxRunning(schedule_) + 1) * context * kLayout.payload_bytes();
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
std::shared_ptr<Chain> Player::ChainOf(uint32_t r) {
  Session& session = sessions_[workload_[r].session];
  const bool goes_on = session.chain != nullptr && session.last == workload_[r].parent &&
                       tree_.shared(r) == tree_.total(session.last);
  std::shared_ptr<Chain> chain =
      goes_on ? std::move(session.chain) : store_->NewChain("", tree_.truncation(), NameOf(r));
  chain->Append(tree_.Tokens(r, chain->num_tokens(), tree_.prompt(r)));
  session.chain.reset();
  return chain;
}

void Player::Arrive(uint32_t r) {
  turns_[r].chain = ChainOf(r);
  queue_.Join(turns_[r].chain);
  queue_changed_ = true;
}

void Player::Start(uint32_t r) {
  if (!Begin(r, UINT32_MAX)) no_room_.push_back(r);
}

bool Player::Begin(uint32_t r, uint32_t max_history) {
  auto begun = store_->Begin(turns_[r].chain, max_history);
  if (!begun.ok()) {
    CA_CHECK(begun.status().code() == Code::kExhausted);
    return false;
  }
  turns_[r].sequence = std::move(begun.value());
  queue_.Leave(turns_[r].chain);
  queue_changed_ = true;
  const CachedTokens& cached = turns_[r].sequence->cached();
  result_.dram_tokens[r] = cached.by_tier[static_cast<int>(Tier::kDevice)] +
                           cached.by_tier[static_cast<int>(Tier::kDram)];
  result_.hit_tokens[r] = result_.dram_tokens[r] + cached.by_tier[static_cast<int>(Tier::kSsd)];
  if (turns_[r].sequence->loading()) loading_.push_back(r);
  return true;
}

// Looks which histories are there by now.
void Player::NoteLoads() {
  std::erase_if(loading_, [&](uint32_t r) {
    if (turns_[r].sequence->loading()) return false;
    result_.load_s[r] = 1e-9 * static_cast<double>(clock_.NowNs() - Ns(schedule_.start[r]));
    return true;
  });
}

// The turn's new tokens, prompt and answer, in as many steps as the window asks for.
Status Player::Compute(uint32_t r) {
  Sequence& sequence = *turns_[r].sequence;
  while (sequence.num_computed_tokens() < tree_.total(r)) {
    if (sequence.room() == 0) sequence.Truncate();
    const uint32_t first = sequence.num_computed_tokens();
    const uint32_t tokens = std::min(tree_.total(r) - first, sequence.room());
    if (Status status = sequence.Reserve(tokens); !status.ok()) return status;
    sequence.LayerDone(0, tokens);
    sequence.Append(tree_.Tokens(r, first, first + tokens));
  }
  return Status();
}

// False: not yet.
bool Player::End(uint32_t r) {
  Turn& turn = turns_[r];
  if (turn.sequence == nullptr) {
    if (!Begin(r, 0)) return false;
    no_room_.remove(r);
    ++result_.without_history;
  }
  if (turn.sequence->loading()) return false;
  const Status status = Compute(r);
  if (!status.ok()) {
    CA_CHECK(status.code() == Code::kExhausted);
    if (NextDeviceNs() != kNever) return false;  // what is under way makes room
    ++result_.not_saved;
    turn.sequence.reset();
  } else {
    turn.sequence->Commit(workload_[r].finish);
  }
  Session& session = sessions_[workload_[r].session];
  if (--session.turns_left == 0 && hints_.over) {
    store_->Advise("", NameOf(r), Advice::kOver);
  } else if (status.ok()) {
    session.chain = std::move(turn.chain);
    session.last = static_cast<int32_t>(r);
    if (hints_.time_to_live_ns > 0) {
      store_->Advise("", NameOf(r), Advice::kTimeToLive, hints_.time_to_live_ns);
    }
  }
  turn = Turn();
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
  const auto due = [&](const std::vector<uint32_t>& order, size_t next,
                       const std::vector<double>& times) {
    return next < order.size() && Ns(times[order[next]]) <= now_ns;
  };
  while (due(schedule_.by_completion, next_completion_, schedule_.completion)) {
    const uint32_t r = schedule_.by_completion[next_completion_++];
    if (!End(r)) due_.push_back(r);
  }
  while (due(schedule_.by_arrival, next_arrival_, schedule_.arrival)) {
    Arrive(schedule_.by_arrival[next_arrival_++]);
  }
  while (due(schedule_.by_arrival, next_start_, schedule_.start)) {
    Start(schedule_.by_arrival[next_start_++]);
  }
  if (std::exchange(queue_changed_, false)) store_->SetQueue(queue_.waiting());
  PollDevices();
}

Result<ReplayResult> Player::Run() {
  const auto next = [](const std::vector<uint32_t>& order, size_t i,
                       const std::vector<double>& times) {
    return i < order.size() ? Ns(times[order[i]]) : kNever;
  };
  for (size_t reported = 0;;) {
    const int64_t scheduled_ns =
        std::min({next(schedule_.by_completion, next_completion_, schedule_.completion),
                  next(schedule_.by_arrival, next_arrival_, schedule_.arrival),
                  next(schedule_.by_arrival, next_start_, schedule_.start)});
    const int64_t device_ns = NextDeviceNs();
    if (std::min(scheduled_ns, device_ns) == kNever) break;
    clock_.MoveTo(std::min(scheduled_ns, device_ns));
    if (device_ns <= scheduled_ns) {
      PollDevices();
    } else {
      PlayMoment(scheduled_ns);
    }
    if (options_.progress && num_ended_ >= reported + kProgressEvery) {
      reported = num_ended_;
      if (!options_.progress(num_ended_)) return Status(Code::kClosed, "the replay was given up");
    }
  }
  CA_CHECK(num_ended_ == tree_.size());
  const StoreStats stats = store_->stats();
  result_.ssd_bytes_read = stats.ssd_bytes_read;
  result_.ssd_bytes_written = stats.ssd_bytes_written;
  result_.dram_evictions = stats.evictions[static_cast<int>(Tier::kDram)];
  result_.ssd_evictions = stats.evictions[static_cast<int>(Tier::kSsd)];
  return std::move(result_);
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

Result<ReplayResult> Replay(const TokenTree& tree, const Schedule& schedule,
                            const ReplayOptions& options) {
  Player player(tree, schedule, options);
  if (Status status = player.Open(); !status.ok()) return status;
  return player.Run();
}

}  // namespace cachedattn
