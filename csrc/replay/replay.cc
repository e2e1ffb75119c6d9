#include "csrc/replay/replay.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <memory>

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
  void PublishQueue() {
    if (std::exchange(queue_changed_, false)) store_->SetQueue(queue_.waiting());
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

  bool tell_over_ = false;  // when a session has had its last turn

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
  result_.device_tokens.resize(tree.size());
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
  if (Status status = SetPolicy(options_.policy, &store.policy, &tell_over_); !status.ok())
    return status;
  store.layout = kLayout;
  store.keep_on_device = options_.device_bytes != 0;
  store.dram_reserve = options_.dram_reserve;
  store.dram_bytes = slots(options_.dram_bytes) * kLayout.host_slot_bytes();
  // Twice what can run: turns that ended may still wait to be saved.
  const uint64_t context = kLayout.num_blocks(tree_.max_context()) + 1;
  const uint64_t device_slots = store.keep_on_device ? slots(options_.device_bytes)
                                                     : 2 * (MaxRunning(schedule_) + 1) * context;
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
  if (!no_room_.empty() || !Begin(r, UINT32_MAX)) no_room_.push_back(r);
}

bool Player::Begin(uint32_t r, uint32_t max_history) {
  auto begun = store_->Begin(turns_[r].chain, max_history);
  if (!begun.ok()) {
    CA_CHECK(begun.status().code() == Code::kExhausted);
    return false;
  }
  turns_[r].sequence = std::move(begun.value());
  if (uint32_t tokens = 0; !ReserveStep(r, &tokens).ok()) {
    turns_[r].sequence.reset();
    return false;
  }
  queue_.Leave(turns_[r].chain);
  queue_changed_ = true;
  const CachedTokens& cached = turns_[r].sequence->cached();
  result_.device_tokens[r] = cached.by_tier[static_cast<int>(Tier::kDevice)];
  result_.dram_tokens[r] = result_.device_tokens[r] + cached.by_tier[static_cast<int>(Tier::kDram)];
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

// Where the step ends that begins with token `first`: a prompt is one step; of an answer's tokens
// the store sees those that take a block's place and those that fill it.
uint32_t Player::StepEnd(uint32_t r, uint32_t first) const {
  if (first < tree_.prompt(r)) return tree_.prompt(r);
  constexpr uint32_t kSize = TokenTree::kBlockSize;
  return std::min(tree_.total(r), first % kSize == 0 ? first + 1 : first / kSize * kSize + kSize);
}

// Slots for the next step's tokens, of which there are `num_tokens`.
Status Player::ReserveStep(uint32_t r, uint32_t* num_tokens) {
  Sequence& sequence = *turns_[r].sequence;
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
  Sequence& sequence = *turns_[r].sequence;
  while (sequence.num_computed_tokens() < tree_.total(r)) {
    uint32_t tokens = 0;
    if (Status status = ReserveStep(r, &tokens); !status.ok()) return status;
    const uint32_t first = sequence.num_computed_tokens();
    sequence.LayerDone(0, tokens);
    sequence.Append(tree_.Tokens(r, first, first + tokens));
    if (first + tokens < tree_.total(r)) Settle();  // the last one ends with the turn
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
  if (--session.turns_left == 0 && tell_over_) {
    store_->Advise("", NameOf(r), Advice::kOver);
  } else if (status.ok()) {
    session.chain = std::move(turn.chain);
    session.last = static_cast<int32_t>(r);
  }
  turn = Turn();
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
  const auto due = [&](const std::vector<uint32_t>& order, size_t next,
                       const std::vector<double>& times) {
    return next < order.size() && Ns(times[order[next]]) <= now_ns;
  };
  while (due(schedule_.by_completion, next_completion_, schedule_.completion)) {
    const uint32_t r = schedule_.by_completion[next_completion_++];
    if (!End(r)) due_.push_back(r);
    Settle();
  }
  while (due(schedule_.by_arrival, next_arrival_, schedule_.arrival)) {
    Arrive(schedule_.by_arrival[next_arrival_++]);
  }
  PublishQueue();
  while (due(schedule_.by_arrival, next_start_, schedule_.start)) {
    Start(schedule_.by_arrival[next_start_++]);
  }
  PublishQueue();
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
  result_.device_evictions = stats.evictions[static_cast<int>(Tier::kDevice)];
  result_.dram_evictions = stats.evictions[static_cast<int>(Tier::kDram)];
  result_.ssd_evictions = stats.evictions[static_cast<int>(Tier::kSsd)];
  result_.events = store_->TakeTrace();
  return std::move(result_);
}

}  // namespace

Result<ReplayResult> Replay(const TokenTree& tree, const Schedule& schedule,
                            const ReplayOptions& options) {
  Player player(tree, schedule, options);
  if (Status status = player.Open(); !status.ok()) return status;
  return player.Run();
}

}  // namespace cachedattn
