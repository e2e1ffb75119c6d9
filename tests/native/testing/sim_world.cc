#include "tests/native/testing/sim_world.h"

#include <algorithm>

#include "csrc/tier/ssd_format.h"
#include "tests/native/testing/sim_copy.h"

namespace cachedattn {

namespace {

constexpr int64_t kQuickUs = 50'000;  // a call that does not wait
constexpr int64_t kSecondNs = 1'000'000'000;

}  // namespace

SimWorld::SimWorld(const WorldOptions& options, SimClock* clock, SimDisk* disk, SimKeys* keys)
    : options_(options), clock_(clock), disk_(disk), keys_(keys), random_(options.seed) {
  disk_->Format(options.seed, options.hostile);
  if (options.encrypt) keys_->Format(options.seed);
  store_options_.layout = options.layout;
  store_options_.identity.bytes[3] = 9;
  store_options_.model_name = "simulated";
  store_options_.dram_bytes = options.dram * options.layout.host_slot_bytes();
  store_options_.device_bytes = options.device * options.layout.payload_bytes();
  if (options.ssd != 0) {
    store_options_.ssd_bytes = SsdFileBytes(options.layout, options.ssd);
    store_options_.path = "simulated";
  }
  store_options_.tenant_quota_bytes = options.quota * options.layout.host_slot_bytes();
  store_options_.policy = options.policy;
  store_options_.keep_on_device = options.keep_on_device;
  store_options_.dram_reserve = options.dram_reserve;
  store_options_.io_depth = options.io_depth;
  store_options_.poison = options.poison;
  store_options_.io_deadline_us = options.deadline_us;
  store_options_.clock = clock;
  for (uint32_t i = 1; i <= options.tenants; ++i) tenants_.emplace_back(i, 't');
  for (uint32_t i = 0; i < options.conversations; ++i) {
    conversations_.push_back(
        {tenants_[i % options.tenants], options.named ? i + 1 : 0, {}, nullptr});
  }
}

void SimWorld::Wrong(const std::string& what) {
  if (right()) report_.wrong = what;
}

// What follows has to end within this much virtual time.
void SimWorld::Allow(int64_t us) { clock_->set_limit(clock_->NowNs() + us * 1000); }

// True while nothing has happened that could cost a block.
bool SimWorld::Harmless() const {
  if (damaged_) return false;
  for (uint32_t i = 0; i < kNumDiskFaults; ++i) {
    if (disk_->fired(static_cast<DiskFault>(i)) != 0) return false;
  }
  return true;
}

Status SimWorld::OpenTier(std::unique_ptr<SsdTier>* ssd) {
  auto file = disk_->OpenFile();
  if (!file.ok()) return file.status();
  SsdOptions options{.directory = "simulated",
                     .layout = store_options_.layout,
                     .identity = store_options_.identity,
                     .model_name = store_options_.model_name,
                     .max_bytes = store_options_.ssd_bytes,
                     .io = {.depth = options_.io_depth},
                     .io_deadline_us = options_.deadline_us,
                     .clock = clock_};
  if (options_.encrypt) {
    options.directory = keys_->directory();
    options.keys = keys_->Load();
  }
  auto tier = SsdTier::OpenOn(options, std::move(file.value()));
  if (!tier.ok()) return tier.status();
  *ssd = std::move(tier.value());
  if (options_.encrypt) keys_->Settle(options.keys.get(), options.identity, tenants_);
  return Status();
}

Status SimWorld::TryOpen() {
  std::unique_ptr<SsdTier> ssd;
  if (options_.ssd != 0) {
    if (Status status = OpenTier(&ssd); !status.ok()) return status;
  }
  auto copy = std::make_unique<SimCopyEngine>(clock_, random_.Next());
  auto store = OpenStoreOn(store_options_, std::move(ssd), std::move(copy));
  if (!store.ok()) return store.status();
  store_ = std::move(store.value());
  return Status();
}

// Until the disk has let go of what closed stores, or such as did not open, left behind.
void SimWorld::AwaitLate() {
  clock_->set_limit(INT64_MAX);
  while (FreeParkedStores() > 0) clock_->Advance(options_.deadline_us * 1000);
}

// Faults may keep a store from opening; without them it must.
void SimWorld::Open() {
  disk_->faults() = options_.faults;
  disk_->faults().hang_ns = options_.deadline_us * 1000;
  disk_->faults().stride = options_.layout.host_slot_bytes();
  Status status;
  for (int tries = 0; tries < 6; ++tries) {
    if (tries == 2) disk_->StopFaults();
    AwaitLate();
    Allow(kQuickUs + 20 * options_.deadline_us);
    status = TryOpen();
    if (status.ok()) return;
    if (Harmless()) break;
    AwaitLate();
    // A file that was lost is made anew, and then the tenants' keys are those of another store.
    const bool other = options_.encrypt && status.code() == Code::kMismatch;
    if (!options_.hostile || (status.code() != Code::kCorrupt && !other)) continue;
    disk_->Erase();
    if (options_.encrypt) keys_->Erase();
  }
  Wrong("the store does not open: " + status.message());
}

// The store is gone after this, cleanly or not.
void SimWorld::End() {
  for (Conversation& conversation : conversations_) EndTurn(&conversation, false);
  Allow(kQuickUs + 100 * options_.deadline_us);
  const Status status = store_->Close();
  if (!status.ok() && Harmless()) Wrong("Close: " + status.message());
  const StoreStats stats = store_->stats();
  report_.checksum_failures += stats.checksum_failures;
  report_.recomputed += stats.tokens_recomputed;
  for (uint32_t t = 0; t < kNumTiers; ++t) report_.hits[t] += stats.tokens_from[t];
  store_.reset();
}

void SimWorld::Crash() {
  disk_->Crash();
  damaged_ = true;
  End();
  Open();
}

void SimWorld::Reopen() {
  End();
  Open();
}

// Tokens that begin like those of every other conversation of the same root.
Tokens SimWorld::NewTokens(uint32_t count, uint32_t root) {
  Tokens tokens;
  for (uint32_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<TokenId>(root != 0 ? root * 50 + i : next_token_++));
  }
  return tokens;
}

// Of computing, against which loads are weighed by what the disk was seen to give.
ComputeCost SimWorld::RandomCost() {
  if (random_.OneIn(2)) return {};
  return {.step_tokens = 1 + random_.Below(16),
          .step_s = random_.OneIn(2) ? 0 : 1e-6 * static_cast<double>(random_.Scale(8)),
          .token_s = 1e-6 * static_cast<double>(random_.Scale(10))};
}

void SimWorld::Start(Conversation* conversation) {
  Tokens& history = conversation->history;
  const uint32_t block = options_.layout.block_size;
  const uint32_t most = options_.max_blocks * block;
  if (history.empty() || history.size() + 2 > most) {
    history = NewTokens(std::min(1 + random_.Below(3 * block), most - 2), 1 + random_.Below(2));
  }
  const auto room = static_cast<uint32_t>(most - history.size());
  Tokens tokens = history;
  const Tokens more = NewTokens(1 + random_.Below(std::min(room - 1, 3 * block)), 0);
  tokens.insert(tokens.end(), more.begin(), more.end());
  auto turn = std::make_unique<Player>(store_.get(), std::move(tokens), options_.truncation,
                                       conversation->tenant, conversation->name);
  Allow(kQuickUs);
  const CachedTokens seen = store_->Lookup(*turn->chain());
  const Status status = turn->Begin(UINT32_MAX, RandomCost());
  if (!status.ok()) {
    if (status.code() != Code::kExhausted) Wrong("Begin: " + status.message());
    return;
  }
  const CachedTokens& found = turn->cached();
  if (found.total + found.recomputed != seen.total) Wrong("Begin found other blocks than Lookup");
  conversation->turn = std::move(turn);
}

void SimWorld::EndTurn(Conversation* conversation, bool commit) {
  Player* turn = conversation->turn.get();
  if (turn == nullptr) return;
  if (!turn->wrong().empty()) Wrong(turn->wrong());
  if (commit) {
    conversation->history = turn->tokens();
    turn->Commit(static_cast<Finish>(random_.Below(3)));
  }
  conversation->turn.reset();
}

void SimWorld::Advance(Conversation* conversation) {
  Player* turn = conversation->turn.get();
  const uint32_t draw = random_.Below(24);
  if (draw == 0) return EndTurn(conversation, false);
  Allow(kQuickUs + 4 * options_.deadline_us * options_.layout.num_layers);
  const uint32_t most = 1 + random_.Below(3 * options_.layout.block_size);
  if (draw == 1) {  // given up halfway
    (void)turn->Step(most, random_.Below(options_.layout.num_layers));
    return EndTurn(conversation, false);
  }
  Status status = turn->Step(most);
  if (status.code() == Code::kExhausted && random_.OneIn(2)) {
    Allow(kQuickUs + 100 * options_.deadline_us);
    store_->Flush();
    Allow(kQuickUs + 4 * options_.deadline_us * options_.layout.num_layers);
    status = turn->Step(most);
  }
  if (!status.ok()) {
    if (status.code() != Code::kExhausted && Harmless()) Wrong("Step: " + status.message());
    ++report_.failed_turns;
    return EndTurn(conversation, false);
  }
  if (turn->finished()) return EndTurn(conversation, true);
  if (!turn->wrong().empty()) Wrong(turn->wrong());
}

void SimWorld::Queue() {
  std::vector<std::shared_ptr<Chain>> chains;
  for (const Conversation& conversation : conversations_) {
    if (conversation.turn != nullptr || conversation.history.empty()) continue;
    chains.push_back(store_->NewChain(conversation.tenant, options_.truncation, conversation.name));
    chains.back()->Append(conversation.history);
  }
  store_->SetQueue(chains);
}

// A hint changes what is kept, never what is right.
void SimWorld::Advise() {
  const Conversation& conversation = conversations_[random_.Below(options_.conversations)];
  store_->Advise(conversation.tenant, conversation.name, static_cast<Advice>(random_.Below(4)),
                 static_cast<int64_t>(random_.Scale(34)));  // up to 17 s
}

void SimWorld::Check() {
  store_->CheckInvariants();
  const StoreStats stats = store_->stats();
  const uint32_t caps[] = {options_.device, options_.dram, options_.ssd};
  for (uint32_t t = 0; t < kNumTiers; ++t) {
    const TierStats& tier = stats.tiers[t];
    if (tier.used_slots > tier.capacity_slots || tier.capacity_slots > caps[t]) {
      Wrong("a tier is above its cap");
    }
  }
  if (disk_->size() > store_options_.ssd_bytes) Wrong("the file is above its cap");
}

void SimWorld::StepOnce() {
  const uint32_t chance = random_.Below(1000);
  if (chance < options_.crash_chance) return Crash();
  if (chance < options_.crash_chance + options_.reopen_chance) return Reopen();
  const uint32_t draw = random_.Below(100);
  Allow(kQuickUs);
  if (draw < 74) {
    Conversation& conversation = conversations_[random_.Below(options_.conversations)];
    return conversation.turn == nullptr ? Start(&conversation) : Advance(&conversation);
  }
  if (draw < 78) return Queue();
  if (draw < 80) return Advise();
  if (draw < 90) return store_->Poll();
  if (draw < 93) {
    clock_->set_limit(INT64_MAX);
    return clock_->Advance(static_cast<int64_t>(random_.Scale(24)) * 1000);  // up to 17 s
  }
  Allow(kQuickUs + 100 * options_.deadline_us);
  if (draw < 95) return store_->Flush();
  store_->DropTier(draw < 98 ? Tier::kDram : Tier::kDevice);
}

// A step that is tried again while moves under way hold the slots that it needs.
Status SimWorld::StepWithPatience(Player* turn) {
  Status status = turn->Step(2 * options_.layout.block_size);
  for (int tries = 0; status.code() == Code::kExhausted && tries < 20; ++tries) {
    store_->Flush();
    clock_->Advance(options_.deadline_us * 1000);
    store_->Poll();
    status = turn->Step(2 * options_.layout.block_size);
  }
  return status;
}

// Every conversation's history once more, to the last byte. Without faults, and after what a fault
// has broken was found, nothing may stand in the way.
void SimWorld::ReadAll() {
  for (Conversation& conversation : conversations_) {
    if (conversation.history.empty()) continue;
    for (int tries = 0; right(); ++tries) {
      conversation.turn =
          std::make_unique<Player>(store_.get(), conversation.history, options_.truncation,
                                   conversation.tenant, conversation.name);
      Allow(kQuickUs + 100 * options_.deadline_us);
      store_->Flush();
      Status status = conversation.turn->Begin(UINT32_MAX);
      while (status.ok() && !conversation.turn->finished()) {
        Allow(kQuickUs + 100 * options_.deadline_us);
        status = StepWithPatience(conversation.turn.get());
      }
      EndTurn(&conversation, status.ok());
      if (status.ok()) break;
      const bool busy = status.code() == Code::kExhausted;
      if (busy) clock_->Advance(options_.deadline_us * 1000);
      store_->Poll();  // loads of turns that have ended hold slots until they land
      if (tries >= 20 || (!busy && !options_.hostile)) Wrong("without faults: " + status.message());
    }
  }
}

// The faults are over: the store is whole again, now and after a restart.
void SimWorld::Recover() {
  for (Conversation& conversation : conversations_) EndTurn(&conversation, false);
  disk_->StopFaults();
  clock_->set_limit(INT64_MAX);
  for (int i = 0; i < 3; ++i) {
    clock_->Advance(31 * kSecondNs);
    for (int j = 0; j < 50; ++j) {  // a probe is a write and a read
      store_->Poll();
      clock_->Advance(1'000'000);
    }
  }
  if (options_.ssd != 0 && std::string_view(store_->stats().ssd_state) != "on") {
    Wrong("the SSD tier does not come back: " + store_->stats().ssd_report);
  }
  ReadAll();
  Check();
  if (!right() || random_.OneIn(2)) return;
  Reopen();
  disk_->StopFaults();
  if (right()) ReadAll();
}

WorldReport SimWorld::Play() {
  Open();
  for (uint32_t step = 0; step < options_.steps && right(); ++step) {
    StepOnce();
    if (right() && step % 8 == 0) Check();
  }
  if (right()) Recover();
  if (store_ != nullptr) End();
  AwaitLate();
  return std::move(report_);
}

}  // namespace cachedattn
