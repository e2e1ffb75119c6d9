#include "csrc/tier/ssd_file.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "csrc/base/fork.h"
#include "csrc/io/direct_file.h"

namespace cachedattn {
namespace {

constexpr int64_t kSyncDeadlines = 15;  // a flush may have much to write

struct Abandoned {
  uint32_t process;
  AlignedBytes pages;
  std::unique_ptr<BlockFile> file;
  std::unique_ptr<IoEngine> engine;  // gone before what it works on
};

struct AllAbandoned {
  std::mutex mutex;
  std::vector<Abandoned> files;
};
AllAbandoned& TheAbandoned() {
  static AllAbandoned& all = *new AllAbandoned;  // never freed: the end of a process does not wait
  return all;
}

}  // namespace

SsdFile::~SsdFile() {
  if (!hung_ || engine_->in_flight() == 0) return;
  const std::lock_guard lock(TheAbandoned().mutex);
  TheAbandoned().files.push_back(
      {ForkDepth(), std::move(pages_), std::move(file_), std::move(engine_)});
}

size_t SsdFile::FreeAbandoned() {
  const std::lock_guard lock(TheAbandoned().mutex);
  std::erase_if(TheAbandoned().files, [](Abandoned& file) {
    if (file.process != ForkDepth()) return false;  // of the parent of a fork
    IoCompletion done;
    while (file.engine->Poll(std::span(&done, 1), 0) > 0) {
    }
    return file.engine->in_flight() == 0;
  });
  return TheAbandoned().files.size();
}

size_t SsdTier::FreeAbandoned() { return SsdFile::FreeAbandoned(); }

Status SsdOptions::Validate() const {
  Status status = layout.Validate();
  if (status.ok()) status = io.Validate();
  if (!status.ok()) return status;
  if (io_deadline_us < 1) {
    return Status(Code::kInvalidArgument, "io_deadline: must be positive");
  }
  if (read_only || SlotsWithin(layout, max_bytes) > 0) return Status();
  return Status(Code::kInvalidArgument, "the SSD tier's cap of " + std::to_string(max_bytes) +
                                            " bytes holds no block; one block needs " +
                                            std::to_string(SsdFileBytes(layout, 1)) + " bytes");
}

// One operation, waited for. Whole or an error.
Status SsdFile::Move(IoOp op, uint64_t offset, std::byte* data, uint32_t size) {
  const int64_t deadline_us = options_.io_deadline_us * (op == IoOp::kSync ? kSyncDeadlines : 1);
  const int64_t deadline_ns = options_.clock->NowNs() + deadline_us * 1000;
  const char* what = op == IoOp::kRead ? "cannot read " : "cannot write ";
  const Status hung(Code::kIo, what + file_->path() + ": the disk does not answer");
  if (hung_) return hung;
  constexpr int kTries = 16;  // where the answer is EAGAIN or EINTR
  for (int tries = 0;; ++tries) {
    engine_->Submit({op, offset, data, size, 0});
    IoCompletion done;
    while (engine_->Poll(std::span(&done, 1), options_.io_deadline_us) == 0) {
      if (options_.clock->NowNs() < deadline_ns) continue;
      hung_ = true;
      return hung;
    }
    if (done.result == static_cast<int64_t>(size)) return Status();
    if ((done.result == -EAGAIN || done.result == -EINTR) && tries < kTries) continue;
    if (done.result < 0) return ErrnoStatus(what + file_->path(), -done.result);
    return Status(Code::kIo, what + file_->path() + ": moved " + std::to_string(done.result) +
                                 " of " + std::to_string(size) + " bytes");
  }
}

Status SsdFile::Open(std::unique_ptr<BlockFile> file) {
  const uint32_t num_slots = SlotsWithin(options_.layout, options_.max_bytes);
  const bool create = !options_.read_only && file->size() == 0;
  Status status = create ? Take(std::move(file)) : OpenReadOnly(std::move(file));
  if (create) {
    if (status.ok()) status = Create(num_slots);
  } else {
    if (status.ok()) status = CheckMatch();
    if (status.ok()) status = ReadIndex();
  }
  if (status.ok() && !options_.read_only) status = Resize(num_slots);
  // Else the next try would find half a file.
  if (!status.ok() && create) (void)file_->Resize(0);
  return status;
}

Status SsdFile::OpenReadOnly(std::unique_ptr<BlockFile> file) {
  const Status status = Take(std::move(file));
  return status.ok() ? Load() : status;
}

Status SsdFile::Take(std::unique_ptr<BlockFile> file) {
  file_ = std::move(file);
  Result<std::unique_ptr<IoEngine>> engine = file_->OpenEngine(options_.io);
  if (!engine.ok()) return engine.status();
  engine_ = std::move(engine.value());
  pages_ = AllocatePages(num_pages() * kPage);
  return Status();
}

// Takes the newest valid superblock copy.
Status SsdFile::Load() {
  const std::string& name = file_->path();
  const Superblock* best = nullptr;
  uint32_t other_version = 0;
  Status error;
  for (uint64_t i = 0; i < 2; ++i) {
    // One by one: a bad sector under one copy must not hide the other.
    std::byte* page = pages_.get() + i * kPage;
    if (file_->size() < (i + 1) * kPage) continue;
    if (Status status = Move(IoOp::kRead, i * kPage, page, kPage); !status.ok()) {
      error = status;
      continue;
    }
    const auto* copy = reinterpret_cast<const Superblock*>(page);
    if (!IsSealed(*copy)) continue;
    if (copy->version != kSsdVersion) {
      other_version = copy->version;
      continue;
    }
    ++num_copies_;
    if (best == nullptr || copy->generation > best->generation) best = copy;
  }
  if (hung_) return error;
  if (best == nullptr && other_version != 0) {
    return Status(Code::kMismatch, name + " has format version " + std::to_string(other_version) +
                                       ", this build reads version " + std::to_string(kSsdVersion));
  }
  if (best == nullptr && !error.ok()) return error;
  if (best == nullptr) {
    return Status(Code::kCorrupt, name +
                                      " is not a store, or both copies of its superblock are "
                                      "damaged; remove it to start with an empty store");
  }
  superblock_ = *best;
  const KvLayout layout = LayoutOf(superblock_);
  if (!layout.Validate().ok() || superblock_.slot_bytes != layout.host_slot_bytes()) {
    return Status(Code::kCorrupt, name + " has a superblock with sizes out of range");
  }
  const uint64_t room = file_->size() < kFirstSlot ? 0 : file_->size() - kFirstSlot;
  num_slots_ = static_cast<uint32_t>(
      std::min<uint64_t>(superblock_.num_slots, room / superblock_.slot_bytes));
  return Status();
}

Status SsdFile::Create(uint32_t num_slots) {
  superblock_ = Superblock();
  if (::getrandom(superblock_.uuid.data(), superblock_.uuid.size(), 0) !=
      static_cast<ssize_t>(superblock_.uuid.size())) {
    return ErrnoStatus("cannot get random bytes", errno);
  }
  const KvLayout& layout = options_.layout;
  superblock_.identity = options_.identity.bytes;
  superblock_.num_layers = layout.num_layers;
  superblock_.num_kv_heads = layout.num_kv_heads;
  superblock_.head_dim = layout.head_dim;
  superblock_.block_size = layout.block_size;
  superblock_.dtype = static_cast<uint32_t>(layout.dtype);
  superblock_.num_slots = num_slots;
  superblock_.slot_bytes = layout.host_slot_bytes();
  if (options_.keys != nullptr) {
    superblock_.cipher = kAes256Gcm;
    superblock_.key_check = options_.keys->CheckOf(superblock_.uuid);
  }
  const size_t length = std::min(options_.model_name.size(), superblock_.model_name.size() - 1);
  std::memcpy(superblock_.model_name.data(), options_.model_name.data(), length);
  // Both copies exist before the file grows, so that a crash leaves a store or an empty file.
  Status status = WriteSuperblock();
  if (status.ok()) status = WriteSuperblock();
  return status;
}

Status SsdFile::CheckMatch() const {
  struct Field {
    const char* name;
    uint64_t stored, expected;
  };
  const KvLayout stored = LayoutOf(superblock_);
  const KvLayout& layout = options_.layout;
  const Field fields[] = {
      {"num_layers", stored.num_layers, layout.num_layers},
      {"num_kv_heads", stored.num_kv_heads, layout.num_kv_heads},
      {"head_dim", stored.head_dim, layout.head_dim},
      {"block_size", stored.block_size, layout.block_size},
  };
  const std::string begin = "the store " + file_->path() + " was made by model \"" +
                            NameOf(superblock_) + "\", this is \"" + options_.model_name + "\": ";
  const auto differ = [&](const std::string& name, const std::string& a, const std::string& b) {
    return Status(Code::kMismatch,
                  begin + name + " is " + a + " there and " + b + " here; use another path");
  };
  for (const Field& field : fields) {
    if (field.stored != field.expected) {
      return differ(field.name, std::to_string(field.stored), std::to_string(field.expected));
    }
  }
  if (stored.dtype != layout.dtype) return differ("dtype", Name(stored.dtype), Name(layout.dtype));
  const Digest identity{superblock_.identity};
  if (identity != options_.identity) {
    return differ("the identity (weights, RoPE, KV format)", identity.Hex().substr(0, 16),
                  options_.identity.Hex().substr(0, 16));
  }
  return CheckKey();
}

Status SsdFile::CheckKey() const {
  const std::string begin = "the store " + file_->path();
  const uint32_t cipher = superblock_.cipher;
  if (cipher > kAes256Gcm) {
    return Status(Code::kMismatch, begin + ": cipher is " + std::to_string(cipher) +
                                       ", which this build does not know");
  }
  if (options_.keys == nullptr) {
    if (cipher == kNoCipher || options_.read_only) return Status();  // headers are plain
    return Status(Code::kMismatch,
                  begin + " is encrypted (cipher is AES-256-GCM): its master key is needed");
  }
  if (cipher == kNoCipher) {
    return Status(Code::kMismatch, begin +
                                       " is not encrypted (cipher is none), and a master key "
                                       "is given; use another path");
  }
  if (options_.keys->CheckOf(superblock_.uuid) == superblock_.key_check) return Status();
  return Status(Code::kMismatch,
                begin + " was encrypted under another master key: key_check differs");
}

// Brings the file to `num_slots` slots; marks the store as not cleanly closed.
Status SsdFile::Resize(uint32_t num_slots) {
  const KvLayout layout = LayoutOf(superblock_);
  const uint64_t old_bytes = file_->size();
  Status status = file_->Resize(SsdFileBytes(layout, num_slots));
  // Where slots will lie now, an index or half a slot may lie.
  uint64_t begin = IndexOffset(layout, num_slots_);
  const uint64_t end = std::min(AlignUp(old_bytes, kPage), IndexOffset(layout, num_slots));
  std::memset(pages_.get(), 0, num_pages() * kPage);
  for (uint64_t size; status.ok() && begin < end; begin += size) {
    size = std::min(end - begin, num_pages() * kPage);
    status = Move(IoOp::kWrite, begin, pages_.get(), static_cast<uint32_t>(size));
  }
  if (!status.ok()) return status;
  superblock_.clean = 0;
  superblock_.num_slots = num_slots_ = num_slots;
  if (index_) {
    std::erase_if(*index_, [&](const ScannedBlock& block) { return block.slot >= num_slots; });
  }
  status = WriteSuperblock();
  return status.ok() ? Move(IoOp::kSync, 0, nullptr, 0) : status;
}

Status SsdFile::WriteSuperblock() {
  ++superblock_.generation;
  Seal(&superblock_);
  std::memcpy(pages_.get(), &superblock_, kPage);
  // The copies take turns: a torn write leaves the other one, which is older and whole.
  return Move(IoOp::kWrite, superblock_.generation % 2 * kPage, pages_.get(), kPage);
}

// A page that does not match is not an error: the headers of the slots say it all.
Status SsdFile::ReadIndex() {
  const KvLayout layout = LayoutOf(superblock_);
  const uint64_t index_pages = NumIndexPages(superblock_.num_slots);
  // With one copy alone nobody knows whether the other one was newer, and not clean.
  if (num_copies_ < 2 || superblock_.clean == 0 || num_slots_ != superblock_.num_slots ||
      file_->size() < SsdFileBytes(layout, superblock_.num_slots)) {
    return Status();
  }
  std::vector<ScannedBlock> blocks;
  for (uint64_t first = 0; first < index_pages; first += num_pages()) {
    const uint64_t count = std::min(num_pages(), index_pages - first);
    Status status = Move(IoOp::kRead, IndexOffset(layout, num_slots_) + first * kPage, pages_.get(),
                         static_cast<uint32_t>(count * kPage));
    if (!status.ok()) return hung_ ? status : Status();
    for (uint64_t i = 0; i < count; ++i) {
      const auto& page = reinterpret_cast<const IndexPage*>(pages_.get())[i];
      if (!IsSealed(superblock_.uuid, superblock_.generation, first + i, page)) return Status();
      for (uint32_t j = 0; j < kEntriesPerPage; ++j) {
        const uint64_t slot = (first + i) * kEntriesPerPage + j;
        const IndexEntry& entry = page.entries[j];
        if (entry.num_tokens == 0) continue;
        if (slot >= num_slots_ || entry.num_tokens > layout.block_size) return Status();
        blocks.push_back({static_cast<SlotId>(slot), HeaderOf(entry)});
      }
    }
  }
  index_ = std::move(blocks);
  return Status();
}

Status SsdFile::WriteIndex(std::span<const ScannedBlock> blocks, uint64_t generation) {
  std::vector<const BlockHeader*> by_slot(num_slots_, nullptr);
  for (const ScannedBlock& block : blocks) by_slot[block.slot] = &block.header;
  const uint64_t index_pages = NumIndexPages(num_slots_);
  for (uint64_t first = 0; first < index_pages; first += num_pages()) {
    const uint64_t count = std::min(num_pages(), index_pages - first);
    auto* pages = reinterpret_cast<IndexPage*>(pages_.get());
    for (uint64_t i = 0; i < count; ++i) {
      pages[i] = IndexPage();
      for (uint32_t j = 0; j < kEntriesPerPage; ++j) {
        const uint64_t slot = (first + i) * kEntriesPerPage + j;
        if (slot >= num_slots_ || by_slot[slot] == nullptr) continue;
        pages[i].entries[j] = EntryOf(*by_slot[slot]);
      }
      Seal(superblock_.uuid, generation, first + i, &pages[i]);
    }
    Status status =
        Move(IoOp::kWrite, IndexOffset(LayoutOf(superblock_), num_slots_) + first * kPage,
             pages_.get(), static_cast<uint32_t>(count * kPage));
    if (!status.ok()) return status;
  }
  return Status();
}

Status SsdFile::Sync(const StoreCounters& counters, std::span<const ScannedBlock> blocks) {
  Status status = WriteIndex(blocks, superblock_.generation + 1);
  // The superblock that says "clean" must not reach the disk before what it vouches for.
  if (status.ok()) status = Move(IoOp::kSync, 0, nullptr, 0);
  superblock_.clean = 1;
  SetCounters(counters, &superblock_);
  if (status.ok()) status = WriteSuperblock();
  if (status.ok()) status = Move(IoOp::kSync, 0, nullptr, 0);
  return status;
}

Result<std::unique_ptr<SsdTier>> SsdTier::Open(const SsdOptions& options) {
  if (Status status = options.Validate(); !status.ok()) return status;
  auto file = OpenStoreFile(options.directory, options.read_only);
  if (!file.ok()) return file.status();
  return OpenOn(options, std::move(file.value()));
}

Result<SsdInfo> ReadSsdInfo(const std::string& directory) {
  auto file = OpenStoreFile(directory, true);
  if (!file.ok()) return file.status();
  SsdOptions options;
  options.io.depth = 1;
  SsdFile opened(options);
  if (Status status = opened.OpenReadOnly(std::move(file.value())); !status.ok()) return status;
  const Superblock& superblock = opened.superblock();
  SsdInfo info;
  info.layout = LayoutOf(superblock);
  info.identity.bytes = superblock.identity;
  info.model_name = NameOf(superblock);
  info.uuid = superblock.uuid;
  info.num_slots = opened.num_slots();
  info.clean = superblock.clean != 0;
  info.encrypted = superblock.cipher != kNoCipher;
  info.counters = CountersOf(superblock);
  return info;
}

Result<bool> EraseTenant(const std::string& directory, const std::string& master_key_file,
                         std::string_view name) {
  auto ring = KeyRing::Open(master_key_file);
  if (!ring.ok()) return ring.status();
  if (auto info = ReadSsdInfo(directory); !info.ok()) return info.status();
  // For its lock: who has the store open would go on with the key.
  auto file = OpenStoreFile(directory, false);
  if (!file.ok()) return file.status();
  SsdOptions options;
  options.keys = std::move(ring.value());
  SsdFile opened(options);
  Status status = opened.OpenReadOnly(std::move(file.value()));
  if (status.ok()) status = opened.CheckKey();
  const Uuid& uuid = opened.superblock().uuid;
  if (status.ok()) status = options.keys->Bind(directory, uuid, options.io_deadline_us);
  if (!status.ok()) return status;
  return options.keys->Erase(options.keys->IdOf(name));
}

}  // namespace cachedattn
