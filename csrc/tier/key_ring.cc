#include "csrc/tier/key_ring.h"

#include <fcntl.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>

#include "csrc/io/private_file.h"

namespace cachedattn {
namespace {

constexpr char kFileName[] = "tenants";
constexpr uint32_t kVersion = 1;

// The file is a head, the entries, and XXH3-64 of all that. All members are bytes or aligned, so
// the structs lie in memory as in the file.
struct FileHead {
  std::array<char, 8> magic = {'C', 'A', 'T', 'T', 'N', 'K', 'E', 'Y'};
  uint32_t version = kVersion;
  uint32_t count = 0;
  std::array<uint8_t, 16> uuid{};
};
static_assert(sizeof(FileHead) == 32);
constexpr uint64_t kEntryBytes = 76;  // tenant 16, nonce 12, wrapped key 32, tag 16
constexpr uint64_t kSumBytes = 8;
static_assert(KeyRing::FileBytes(3) == sizeof(FileHead) + 3 * kEntryBytes + kSumBytes);

std::string_view Text(std::span<const uint8_t> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string Label(const std::array<uint8_t, 16>& uuid, std::string_view label) {
  return std::string(Text(uuid)).append(label);
}

std::array<uint8_t, 16> FirstHalf(const Digest& digest) {
  std::array<uint8_t, 16> half;
  std::copy_n(digest.bytes.begin(), half.size(), half.begin());
  return half;
}

int HexDigit(uint8_t c) {
  if (c >= '0' && c <= '9') return c - '0';
  c |= 0x20;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// 32 bytes, or 64 digits and the end of a line.
bool ParseKey(std::span<const uint8_t> text, CipherKey* key) {
  if (text.size() == key->size()) {
    std::copy(text.begin(), text.end(), key->begin());
    return true;
  }
  while (text.size() > 64 && (text.back() == '\n' || text.back() == '\r')) {
    text = text.first(text.size() - 1);
  }
  if (text.size() != 64) return false;
  for (size_t i = 0; i < key->size(); ++i) {
    const int high = HexDigit(text[2 * i]), low = HexDigit(text[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    (*key)[i] = static_cast<uint8_t>(high << 4 | low);
  }
  return true;
}

std::span<const std::byte> AsBytes(const CipherKey& key) { return std::as_bytes(std::span(key)); }

}  // namespace

// A write of the file, on a thread of its own: the disk may not answer before the deadline.
struct KeyRing::Write {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  Status status;
};

Result<std::unique_ptr<KeyRing>> KeyRing::Open(const std::string& master_key_file) {
  const std::string what = "the master key " + master_key_file;
  auto file = OpenPrivate(AT_FDCWD, master_key_file, what);
  if (!file.ok()) return file.status();
  if (!file.value().fd.ok()) return ErrnoStatus("cannot open " + what, ENOENT);
  std::unique_ptr<KeyRing> ring(new KeyRing);
  auto& text = ring->secrets_->text;
  const uint64_t size = file.value().size;
  bool valid = size <= text.size();
  if (valid) {
    const auto bytes = std::span(text).first(size);
    if (Status status = ReadPrivate(file.value(), bytes, what); !status.ok()) return status;
    valid = ParseKey(bytes, &ring->secrets_->master);
  }
  Wipe(text);
  if (valid) return ring;
  return Status(Code::kInvalidArgument, what +
                                            " holds no key: it must be 32 bytes or 64 hexadecimal "
                                            "digits, and has " +
                                            std::to_string(size) + " bytes");
}

KeyRing::~KeyRing() = default;

std::array<uint8_t, 16> KeyRing::CheckOf(const std::array<uint8_t, 16>& uuid) const {
  return FirstHalf(HmacSha256(secrets_->master, Label(uuid, "check")));
}

Status KeyRing::Bind(const std::string& directory, const std::array<uint8_t, 16>& uuid,
                     int64_t deadline_us) {
  CA_CHECK(directory_ == nullptr);
  uuid_ = uuid;
  deadline_us_ = deadline_us;
  path_ = directory + "/" + kFileName;
  directory_ =
      std::make_shared<UniqueFd>(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_->ok())
    return ErrnoStatus("cannot open the store's directory " + directory, errno);
  auto file = OpenPrivate(directory_->get(), kFileName, path_);
  if (!file.ok()) return file.status();
  if (!file.value().fd.ok()) return Status();
  const uint64_t size = file.value().size;
  if (size < FileBytes(0) || size > FileBytes(kMaxTenants)) {
    return Status(Code::kCorrupt, path_ + " has a length of " + std::to_string(size) + " bytes");
  }
  std::vector<uint8_t> bytes(size);
  if (Status status = ReadPrivate(file.value(), bytes, path_); !status.ok()) return status;
  return Parse(bytes);
}

Status KeyRing::Parse(const std::vector<uint8_t>& bytes) {
  const auto corrupt = [&](const std::string& what) {
    return Status(Code::kCorrupt, path_ + ": " + what +
                                      "; remove it to start without tenants: what they "
                                      "have in the store is lost then");
  };
  FileHead head;
  std::memcpy(&head, bytes.data(), sizeof(head));
  uint64_t sum;
  std::memcpy(&sum, bytes.data() + bytes.size() - kSumBytes, kSumBytes);
  if (head.magic != FileHead().magic) return corrupt("it is not a list of tenants");
  if (head.version != kVersion) {
    return Status(Code::kMismatch, path_ + " has format version " + std::to_string(head.version) +
                                       ", this build reads version " + std::to_string(kVersion));
  }
  if (sum != XXH3_64bits(bytes.data(), bytes.size() - kSumBytes)) {
    return corrupt("its checksum does not match");
  }
  // A count that was not written by us would overflow nothing here: it has 32 bits.
  if (bytes.size() != FileBytes(head.count)) return corrupt("its length does not fit its count");
  if (head.uuid != uuid_) {
    return Status(Code::kMismatch, path_ +
                                       ": uuid is that of another store; remove the file if "
                                       "that store is not needed any more");
  }
  const uint8_t* at = bytes.data() + sizeof(head);
  const auto take = [&at](auto* field) {
    std::memcpy(field->data(), at, field->size());
    at += field->size();
  };
  for (uint32_t i = 0; i < head.count; ++i) {
    TenantId tenant;
    Wrapped wrapped;
    take(&tenant);
    take(&wrapped.nonce);
    take(&wrapped.key);
    take(&wrapped.tag);
    if (!wrapped_.emplace(tenant, wrapped).second) return corrupt("a tenant is there twice");
    const bool whole = Unwrap(tenant);
    Wipe(secrets_->data);
    if (!whole) return corrupt("key " + std::to_string(i) + " does not unwrap");
  }
  return Status();
}

std::vector<uint8_t> KeyRing::Serialized() const {
  std::vector<uint8_t> bytes(sizeof(FileHead));
  FileHead head;
  head.count = static_cast<uint32_t>(wrapped_.size());
  head.uuid = uuid_;
  std::memcpy(bytes.data(), &head, sizeof(head));
  const auto put = [&bytes](const auto& field) {
    bytes.insert(bytes.end(), field.begin(), field.end());
  };
  for (const auto& [tenant, wrapped] : wrapped_) {
    put(tenant);
    put(wrapped.nonce);
    put(wrapped.key);
    put(wrapped.tag);
  }
  const uint64_t sum = XXH3_64bits(bytes.data(), bytes.size());
  bytes.resize(bytes.size() + kSumBytes);
  std::memcpy(bytes.data() + bytes.size() - kSumBytes, &sum, kSumBytes);
  return bytes;
}

// Two writes never run at once: the older could end last.
Status KeyRing::Save() {
  const auto late = [this] {
    return Status(Code::kIo, "writing " + path_ + ": the disk did not answer within " +
                                 std::to_string(deadline_us_ / 1000) + " ms");
  };
  if (write_ != nullptr) {
    const std::lock_guard lock(write_->mutex);
    if (!write_->done) return late();
  }
  write_ = std::make_shared<Write>();
  const auto run = [write = write_, directory = directory_, bytes = Serialized(), path = path_] {
    Status status = ReplacePrivate(directory->get(), kFileName, bytes, path);
    const std::lock_guard lock(write->mutex);
    write->status = std::move(status);
    write->done = true;
    write->changed.notify_all();
  };
  try {
    std::thread(run).detach();
  } catch (const std::system_error& error) {
    write_.reset();
    return Status(Code::kIo, std::string("cannot start a thread: ") + error.what());
  }
  std::unique_lock lock(write_->mutex);
  if (!write_->changed.wait_for(lock, std::chrono::microseconds(deadline_us_),
                                [this] { return write_->done; })) {
    return late();
  }
  return write_->status;
}

TenantId KeyRing::IdOf(std::string_view name) const {
  return FirstHalf(HmacSha256(secrets_->master, Label(uuid_, "tenant").append(name)));
}

std::array<uint8_t, 32> KeyRing::WrapAad(const TenantId& tenant) const {
  std::array<uint8_t, 32> aad;
  std::copy(uuid_.begin(), uuid_.end(), aad.begin());
  std::copy(tenant.begin(), tenant.end(), aad.begin() + uuid_.size());
  return aad;
}

// The tenant's data key, into secrets_->data; the caller wipes it.
bool KeyRing::Unwrap(const TenantId& tenant) const {
  const auto found = wrapped_.find(tenant);
  if (found == wrapped_.end()) return false;
  const Wrapped& wrapped = found->second;
  AesGcm cipher(secrets_->master);
  return cipher.Open(wrapped.nonce, WrapAad(tenant), wrapped.tag, AsBytes(wrapped.key),
                     std::as_writable_bytes(std::span(secrets_->data)).data());
}

BlockKey KeyRing::RootOf(const Digest& identity, std::string_view name) {
  const TenantId tenant = IdOf(name);
  CipherKey& data = secrets_->data;
  if (!Has(tenant)) {
    FillRandom(data);
    if (wrapped_.size() < kMaxTenants) {
      Wrapped wrapped;
      FillRandom(wrapped.nonce);
      AesGcm cipher(secrets_->master);
      wrapped.tag = cipher.Seal(wrapped.nonce, WrapAad(tenant), AsBytes(data),
                                std::as_writable_bytes(std::span(wrapped.key)).data());
      wrapped_.emplace(tenant, wrapped);
      unsaved_ = true;
    }
  } else {
    CA_CHECK(Unwrap(tenant));  // it did at Bind
  }
  if (unsaved_) unsaved_ = !Save().ok();
  Digest secret = HmacSha256(data, "root");
  const BlockKey root = RootKey(identity, name, secret.bytes);
  Wipe(data);
  Wipe(secret.bytes);
  return root;
}

std::unique_ptr<AesGcm> KeyRing::CipherOf(const TenantId& tenant, const Salt& salt) const {
  if (!Unwrap(tenant)) return nullptr;
  Digest key = HmacSha256(secrets_->data, Label(uuid_, Text(salt)));
  secrets_->block = key.bytes;
  auto cipher = std::make_unique<AesGcm>(secrets_->block);
  Wipe(key.bytes);
  Wipe(secrets_->data);
  Wipe(secrets_->block);
  return cipher;
}

Result<bool> KeyRing::Erase(const TenantId& tenant) {
  auto node = wrapped_.extract(tenant);
  if (node.empty()) return false;
  if (Status status = Save(); !status.ok()) {
    wrapped_.insert(std::move(node));
    unsaved_ = true;  // the file may have been written after all
    return status;
  }
  unsaved_ = false;
  Wipe(node.mapped().key);
  return true;
}

}  // namespace cachedattn
