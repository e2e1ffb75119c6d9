#include "csrc/store/preload.h"

#include <algorithm>

namespace cachedattn {

namespace {

// Larger reads gain nothing, smaller ones cost rate (measured; design D11).
constexpr uint64_t kMaxPieceBytes = 1 << 20;

// Reads handed to the engine: enough that the disk has work until the next layer is computed, also
// where slices are small; few enough that who comes later does not wait long.
constexpr uint64_t kMaxReadBytesInFlight = 64 << 20;

constexpr uint64_t kNoTag = UINT64_MAX;

// A layer waits for the whole of its group. While the disk is the slower one, what is computed lags
// behind it by a group, so there are so many groups at least.
constexpr uint32_t kMinGroups = 8;

// Pieces grow from one layer on, so that the first layers of all blocks come early and the disk
// stays ahead of the computation; at the end they shrink, so that little is left to compute when
// the last of them is there.
std::vector<std::pair<uint32_t, uint32_t>> LayerGroups(const KvLayout& layout) {
  const auto most = static_cast<uint32_t>(
      std::clamp<uint64_t>(kMaxPieceBytes / layout.slice_stride(), 1,
                           (layout.num_layers + kMinGroups - 1) / kMinGroups));
  std::vector<std::pair<uint32_t, uint32_t>> groups;
  for (uint32_t first = 0, size = 1; first < layout.num_layers; ++size) {
    size = std::min({size, most, (layout.num_layers - first + 1) / 2});
    groups.emplace_back(first, size);
    first += size;
  }
  return groups;
}

}  // namespace

Preloader::Preloader(Tiers* tiers, Directory* directory, Trace* trace, const Clock* clock)
    : tiers_(tiers),
      directory_(directory),
      trace_(trace),
      clock_(clock),
      groups_(LayerGroups(tiers->layout)),
      reads_(tiers->layout.num_layers),
      loads_(tiers->layout.num_layers) {}

FillRef Preloader::NewFill(const BlockRef& block, Tier target, SlotId slot, uint64_t sequence) {
  auto fill = std::make_shared<Fill>();
  fill->block = block;
  fill->source = directory_->Pin(block, target == Tier::kDram ? Tier::kSsd : Tier::kDram);
  fill->tier = target;
  fill->target = (target == Tier::kDram ? *tiers_->dram : *tiers_->device).slot(slot);
  fill->sequence = sequence;
  if (sequence != 0) MakeUrgent(fill.get());
  return fill;
}

void Preloader::MakeUrgent(Fill* fill) {
  if (std::exchange(fill->urgent, true)) return;
  if (num_urgent_++ == 0) loading_since_ns_ = clock_->NowNs();
}

void Preloader::Share(const FillRef& fill, Slot slot, Tier tier) {
  fill->transfer = directory_->BeginFill(fill->block, tier, std::move(slot));
  fills_.emplace(&fill->block->copy(tier), fill);
}

void Preloader::KeepPrivate(const FillRef& fill, Slot slot) {
  fill->private_slot = std::move(slot);
  if (private_fills_.size() == private_fills_.capacity()) {  // rarely: as long as all that runs
    std::erase_if(private_fills_, [](const auto& weak) { return weak.expired(); });
    private_fills_.reserve(2 * private_fills_.size() + 16);
  }
  private_fills_.push_back(fill);
}

FillRef Preloader::FillOf(const Block& block, Tier tier) const {
  const auto it = fills_.find(&block.copy(tier));
  return it == fills_.end() ? nullptr : it->second;
}

FillRef Preloader::StartRead(const BlockRef& block, Slot slot, bool whole, uint64_t sequence) {
  FillRef fill = NewFill(block, Tier::kDram, slot.id(), sequence);
  Share(fill, std::move(slot), Tier::kDram);
  QueueRead(fill, whole);
  return fill;
}

FillRef Preloader::StartPrivateRead(const BlockRef& block, Slot slot, uint64_t sequence) {
  FillRef fill = NewFill(block, Tier::kDram, slot.id(), sequence);
  KeepPrivate(fill, std::move(slot));
  QueueRead(fill, false);
  return fill;
}

void Preloader::QueueRead(const FillRef& fill, bool whole) {
  read_bytes_waiting_ += tiers_->layout.payload_bytes();
  if (whole) {
    reads_.Push(0, {fill, 0, tiers_->layout.num_layers});
    fill->pieces_left = 1;
    return;
  }
  for (const auto& [first, count] : groups_) reads_.Push(first, {fill, first, count});
  fill->pieces_left = static_cast<uint32_t>(groups_.size());
}

FillRef Preloader::StartLoad(const BlockRef& block, Slot slot, uint64_t sequence) {
  FillRef fill = NewFill(block, Tier::kDevice, slot.id(), sequence);
  Share(fill, std::move(slot), Tier::kDevice);
  Follow(fill);
  return fill;
}

FillRef Preloader::StartPrivateLoad(const BlockRef& block, Slot slot, uint64_t sequence) {
  FillRef fill = NewFill(block, Tier::kDevice, slot.id(), sequence);
  KeepPrivate(fill, std::move(slot));
  Follow(fill);
  return fill;
}

// Queues the copies of the slices that are in DRAM; the others follow as they land.
void Preloader::Follow(const FillRef& fill) {
  fill->pieces_left = tiers_->layout.num_layers;
  const FillRef feeder = FillOf(*fill->block, Tier::kDram);
  CA_CHECK(feeder != nullptr || fill->block->ready(Tier::kDram));
  if (feeder != nullptr) feeder->followers.push_back(fill);
  for (uint32_t layer = 0; layer < tiers_->layout.num_layers; ++layer) {
    if (feeder == nullptr || feeder->landed[layer]) loads_.Push(layer, {fill, layer, 1});
  }
}

bool Preloader::Estimate(std::span<const BlockRef> blocks, TurnLoad* turn) const {
  const auto seconds = [](uint64_t bytes, double rate) { return rate > 0 ? bytes / rate : 0; };
  const uint64_t bytes = tiers_->layout.payload_bytes();
  const double read_rate = tiers_->ssd != nullptr ? tiers_->ssd->read_rate() : 0;
  const double copy_s = tiers_->device ? seconds(bytes, load_rate_.rate(clock_->NowNs())) : 0;
  const Tier pool = tiers_->pool_tier();
  turn->wait_s = seconds(read_bytes_waiting_ + read_bytes_in_flight_, read_rate);
  for (const BlockRef& block : blocks) {
    const bool reading = pool == Tier::kDevice && !block->absent(pool);
    const bool read = block->absent(Tier::kDram) && block->absent(pool);
    if (read && read_rate == 0) return false;
    const double read_s = read ? seconds(bytes, read_rate) : 0;
    turn->blocks.push_back({block->ready(pool), std::max(read_s, reading ? 0 : copy_s)});
  }
  return true;
}

double Preloader::SecondsLeft(std::span<const Fill* const> fills) const {
  uint64_t to_read = 0, to_copy = 0;  // slices
  for (const Fill* fill : fills) {
    const FillRef feeder = FillOf(*fill->block, Tier::kDram);
    if (feeder != nullptr) to_read += tiers_->layout.num_layers - feeder->landed.count();
    if (fill->tier == Tier::kDevice) to_copy += tiers_->layout.num_layers - fill->landed.count();
  }
  const auto seconds = [this](uint64_t slices, double rate) {
    return slices == 0 ? 0 : static_cast<double>(slices * tiers_->layout.slice_stride()) / rate;
  };
  const double read_rate = tiers_->ssd != nullptr ? tiers_->ssd->read_rate() : 0;
  return std::max(seconds(to_read, read_rate), seconds(to_copy, load_rate_.rate(clock_->NowNs())));
}

void Preloader::AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const {
  for (const auto& weak : private_fills_) {
    const FillRef fill = weak.lock();
    if (fill == nullptr || !fill->private_slot) continue;
    (*places)[static_cast<int>(fill->tier)].push_back(fill->private_slot.id());
  }
}

void Preloader::Pump() {
  while (!reads_.empty() && (!tiers_->ssd_on || (tiers_->ssd->can_submit() &&
                                                 read_bytes_in_flight_ < kMaxReadBytesInFlight))) {
    StartReadPiece(reads_.Pop());
  }
  if (tiers_->copy != nullptr) StartLoads();
}

void Preloader::StartLoads() {
  const int64_t now_ns = clock_->NowNs();
  const bool idle = num_loads_in_flight_ == 0;
  load_rate_.Look(now_ns, now_ns, bytes_loaded_ - std::exchange(bytes_rated_, bytes_loaded_), idle);
  if (idle && !loads_.empty()) load_rate_.Begin(now_ns);
  while (!loads_.empty() && num_loads_in_flight_ < tiers_->copy->load_depth()) {
    Piece piece = loads_.Pop();
    if (!piece.fill->status.ok()) {
      EndPiece(piece);
      continue;
    }
    const KvLayout& layout = tiers_->layout;
    const Fill& fill = *piece.fill;
    const SlotId slot = fill.source.slot();
    trace_->Add(TraceKind::kLoadStart, fill.sequence, piece.first_layer, 1, slot, fill.block.get());
    const uint64_t offset = layout.device_slice_offset(piece.first_layer);
    const CopyRequest request{.stream = CopyStream::kLoad,
                              .source = tiers_->dram->payload(slot) + offset,
                              .target = fill.target + offset,
                              .size = layout.slice_stride(),
                              .tag = next_tag_++};
    piece.fill->load_tags.resize(layout.num_layers, kNoTag);
    piece.fill->load_tags[piece.first_layer] = request.tag;
    started_.emplace(request.tag, std::move(piece));
    ++num_loads_in_flight_;
    tiers_->copy->Enqueue(request);
  }
}

bool Preloader::Visible(Fill* fill, uint32_t layer) {
  if (fill->visible[layer]) return true;
  const bool started = !fill->load_tags.empty() && fill->load_tags[layer] != kNoTag;
  if (!fill->landed[layer] &&
      !(started && tiers_->copy->OrderComputeAfter(fill->load_tags[layer]))) {
    return false;
  }
  fill->visible.set(layer);
  return true;
}

bool Preloader::WaitsForSsd(const Fill& fill, uint32_t layer) const {
  if (fill.tier == Tier::kDram) return true;
  const FillRef feeder = FillOf(*fill.block, Tier::kDram);
  return feeder != nullptr && !feeder->landed[layer];
}

void Preloader::StartReadPiece(Piece piece) {
  const uint64_t bytes = piece.num_layers * tiers_->layout.slice_stride();
  read_bytes_waiting_ -= bytes;
  if (!tiers_->ssd_on) Fail(piece.fill.get(), Status(Code::kIo, "the SSD tier is off"));
  const Fill& fill = *piece.fill;
  if (!fill.status.ok()) {
    EndPiece(piece);
    return;
  }
  const Block& block = *fill.block;
  const SlotId slot = fill.source.slot();
  const BlockHeader header = directory_->HeaderOf(block);
  trace_->Add(TraceKind::kReadStart, fill.sequence, piece.first_layer, piece.num_layers, slot,
              &block);
  const uint64_t tag = next_tag_++;
  const uint32_t first_layer = piece.first_layer, num_layers = piece.num_layers;
  std::byte* const target = fill.target;
  started_.emplace(tag, std::move(piece));
  ++num_reads_in_flight_;
  read_bytes_in_flight_ += bytes;
  tiers_->ssd->StartRead(slot, header, first_layer, num_layers, target, tag);
}

void Preloader::OnRead(const SsdCompletion& done) {
  const auto it = started_.find(done.tag);
  CA_CHECK(it != started_.end());
  const FillRef fill = it->second.fill;
  if (!it->second.late) {
    --num_reads_in_flight_;
    read_bytes_in_flight_ -= it->second.num_layers * tiers_->layout.slice_stride();
    trace_->Add(TraceKind::kReadEnd, fill->sequence, it->second.first_layer, it->second.num_layers,
                fill->source.slot(), fill->block.get());
  }
  if (done.late) {
    it->second.late = true;
    ++num_late_;
    if (fill->late_pieces++ == 0) ++num_quarantined_;
    Fail(fill.get(), done.status);
    return;
  }
  const Piece piece = std::move(it->second);
  started_.erase(it);
  if (piece.late) {
    --num_late_;
    if (--fill->late_pieces == 0) --num_quarantined_;
  } else if (done.status.ok()) {
    Landed(piece);
  } else {
    Fail(fill.get(), done.status);
  }
  EndPiece(piece);
}

void Preloader::OnLoad(uint64_t tag) {
  auto node = started_.extract(tag);
  CA_CHECK(!node.empty());
  const Piece& piece = node.mapped();
  --num_loads_in_flight_;
  bytes_loaded_ += tiers_->layout.slice_stride();
  trace_->Add(TraceKind::kLoadEnd, piece.fill->sequence, piece.first_layer, 1,
              piece.fill->source.slot(), piece.fill->block.get());
  Landed(piece);
  EndPiece(piece);
}

void Preloader::Landed(const Piece& piece) {
  Fill* fill = piece.fill.get();
  for (uint32_t i = 0; i < piece.num_layers; ++i) {
    const uint32_t layer = piece.first_layer + i;
    fill->landed.set(layer);
    for (const FillRef& follower : fill->followers) loads_.Push(layer, {follower, layer, 1});
  }
}

void Preloader::EndPiece(const Piece& piece) {
  Fill* fill = piece.fill.get();
  CA_CHECK(fill->pieces_left > 0);
  if (--fill->pieces_left == 0) Finish(fill);
}

void Preloader::Finish(Fill* fill) {
  fill->done = true;
  if (fill->urgent && --num_urgent_ == 0) loading_ns_ += clock_->NowNs() - loading_since_ns_;
  fill->followers.clear();
  fill->source.Release();
  const BlockRef block = std::move(fill->transfer.block);
  if (block == nullptr) return;  // a private slot
  fills_.erase(&block->copy(fill->transfer.tier));
  if (fill->status.ok()) {
    directory_->FinishFill(Transfer(block, fill->transfer.tier));
  }  // else it is forgotten; who waits has the fill
}

// The block is a miss from now on; who waits for it sees the status. Its slots are held until
// every piece has come back.
void Preloader::Fail(Fill* fill, const Status& status) {
  if (!fill->status.ok()) return;
  ++num_failed_;
  fill->status = status;
  directory_->Forget(fill->block.get());
  for (const FillRef& follower : fill->followers) {
    follower->status = status;
    // Only the slices that reached DRAM have become pieces.
    follower->pieces_left = static_cast<uint32_t>(fill->landed.count() - follower->landed.count());
    if (follower->pieces_left == 0) Finish(follower.get());
  }
  fill->followers.clear();  // slices that still land go nowhere
}

}  // namespace cachedattn
