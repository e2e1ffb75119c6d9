#include "csrc/store/save.h"

#include <cstring>

#include "csrc/tier/ssd_format.h"

namespace cachedattn {

namespace {

uint64_t TokenBytes(const KvLayout& layout) {
  return uint64_t{layout.head_dim} * SizeOf(layout.dtype);
}

}  // namespace

Saver::Saver(Tiers* tiers, Directory* directory, Evictor* evictor, Trace* trace,
             bool keep_on_device)
    : tiers_(tiers),
      directory_(directory),
      evictor_(evictor),
      trace_(trace),
      keep_on_device_(keep_on_device),
      sums_(tiers->ssd && tiers->copy && tiers->copy->takes_sums() &&
            TokenBytes(tiers->layout) % sizeof(uint64_t) == 0) {}

SaveRef Saver::Begin(SlotId device_slot, uint64_t sequence, uint32_t tenant) {
  if (!evictor_->KeepQuota(Tier::kDram, tenant, 1)) return nullptr;
  if (!evictor_->MakeRoom(Tier::kDram, 1, false, tenant)) return nullptr;
  auto save = std::make_shared<Save>();
  save->device_slot = device_slot;
  save->target = tiers_->dram->slots().Take(tenant);
  save->target_id = save->target.id();
  save->num_tokens = tiers_->layout.block_size;
  save->sequence = sequence;
  if (saves_.size() == saves_.capacity()) {  // rarely: the list is as long as all that runs
    std::erase_if(saves_, [](const auto& weak) { return weak.expired(); });
    saves_.reserve(2 * saves_.size() + 16);
  }
  saves_.push_back(save);
  return save;
}

void Saver::Layer(const SaveRef& save, uint32_t layer) {
  if (save->started[layer]) return;
  save->started.set(layer);
  const KvLayout& layout = tiers_->layout;
  const uint64_t offset = layout.device_slice_offset(layer);
  trace_->Add(TraceKind::kSaveStart, save->sequence, layer, 1, save->device_slot,
              save->block.get());
  CopyRequest request{.stream = CopyStream::kSave,
                      .source = tiers_->device->payload(save->device_slot) + offset,
                      .target = tiers_->dram->payload(save->target_id) + offset,
                      .size = layout.slice_stride(),
                      .tag = next_tag_++};
  if (sums_) {
    // Where its seal will be; until then nobody reads the page.
    request.sum = &reinterpret_cast<BlockPage*>(tiers_->dram->slot(save->target_id))->seals[layer];
    request.rows = {.size = static_cast<uint32_t>(layout.slice_bytes()),
                    .row_bytes = static_cast<uint32_t>(layout.block_size * TokenBytes(layout)),
                    .used_bytes = static_cast<uint32_t>(save->num_tokens * TokenBytes(layout))};
  }
  in_flight_.emplace(request.tag, Slice{save, layer});
  tiers_->copy->Enqueue(request);
}

void Saver::Publish(const SaveRef& save, const BlockRef& block) {
  if (!block->absent(Tier::kDram)) return;
  save->num_tokens = block->num_tokens;
  for (uint32_t layer = 0; layer < tiers_->layout.num_layers; ++layer) Layer(save, layer);
  save->block = block;
  if (block->ready(Tier::kDevice)) save->source = directory_->Pin(block, Tier::kDevice);
  save->transfer = directory_->BeginFill(block, Tier::kDram, std::move(save->target));
  FinishIfLanded(save.get());
}

void Saver::Leave(const BlockRef& block) {
  const Copy& copy = block->copy(Tier::kDevice);
  if (!block->listed || copy.state != CopyState::kReady || copy.pins > 0 || copy.leaving) return;
  if (block->ready(Tier::kDram) || (tiers_->ssd_on && block->ready(Tier::kSsd))) {
    if (!keep_on_device_) directory_->Drop(block.get(), Tier::kDevice);
  } else if (block->absent(Tier::kDram)) {
    Queue(block);  // its other copies went while the turn ran
  }
}

void Saver::Queue(const BlockRef& block) {
  directory_->SetLeaving(block.get(), Tier::kDevice, true);
  queue_.push_back(block->key);
}

bool Saver::Pump() {
  bool begun = false;
  for (size_t left = queue_.size(); left > 0; --left) {
    const BlockRef block = directory_->Find(queue_.front());
    if (block != nullptr && block->copy(Tier::kDevice).leaving) {
      if (block->absent(Tier::kDram)) {
        if (!evictor_->KeepQuota(Tier::kDram, block->tenant, 1)) {
          queue_.push_back(block->key);  // other tenants do not wait for it
          queue_.pop_front();
          continue;
        }
        const SaveRef save = Begin(block->copy(Tier::kDevice).slot.id(), 0, block->tenant);
        if (save == nullptr) return begun;
        Publish(save, block);
        begun = true;
      }
      directory_->SetLeaving(block.get(), Tier::kDevice, false);
      Leave(block);
    }
    queue_.pop_front();
  }
  return begun;
}

void Saver::OnCopy(uint64_t tag) {
  auto node = in_flight_.extract(tag);
  CA_CHECK(!node.empty());
  const Slice& slice = node.mapped();
  trace_->Add(TraceKind::kSaveEnd, slice.save->sequence, slice.layer, 1, slice.save->device_slot,
              slice.save->block.get());
  ++slice.save->num_landed;
  bytes_saved_ += tiers_->layout.slice_stride();
  FinishIfLanded(slice.save.get());
}

void Saver::FinishIfLanded(Save* save) {
  const KvLayout& layout = tiers_->layout;
  if (save->block == nullptr || save->num_landed < layout.num_layers) return;
  const BlockRef block = std::move(save->block);
  if (tiers_->copy->moves_bytes()) {
    ZeroUnusedTokens(layout, block->num_tokens, tiers_->dram->payload(save->target_id));
  }
  if (sums_) {
    std::byte* const slot = tiers_->dram->slot(save->target_id);
    SealSums(tiers_->ssd->uuid(), layout, block->key, slot);
    block->copy(Tier::kDram).sealed = true;
  }
  directory_->FinishFill(std::move(save->transfer));
  save->source.Release();
  save->source_slot.Release();
  directory_->DropReplaced(block.get(), tiers_->ssd == nullptr);
  Leave(block);
}

void Saver::AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const {
  for (const auto& weak : saves_) {
    const SaveRef save = weak.lock();
    if (save == nullptr) continue;
    if (save->target) (*places)[static_cast<int>(Tier::kDram)].push_back(save->target.id());
    if (save->source_slot) {
      (*places)[static_cast<int>(Tier::kDevice)].push_back(save->source_slot.id());
    }
  }
}

void ZeroUnusedTokens(const KvLayout& layout, uint32_t num_tokens, std::byte* payload) {
  const uint64_t token_bytes = TokenBytes(layout);
  const uint64_t head_bytes = layout.block_size * token_bytes;
  const uint64_t used = num_tokens * token_bytes;
  if (used == head_bytes) return;
  for (uint32_t layer = 0; layer < layout.num_layers; ++layer) {
    std::byte* slice = payload + layout.device_slice_offset(layer);
    for (uint32_t head = 0; head < 2 * layout.num_kv_heads; ++head) {
      std::memset(slice + head * head_bytes + used, 0, head_bytes - used);
    }
  }
}

}  // namespace cachedattn
