#include "csrc/replay/hardware.h"

#include <algorithm>

namespace cachedattn {

void DeviceQueue::Add(uint64_t tag, int64_t busy_ns, int64_t latency_ns) {
  free_ns_ = std::max(free_ns_, clock_->NowNs()) + busy_ns;
  pending_.push_back({free_ns_ + latency_ns, tag});
}

bool DeviceQueue::Take(uint64_t* tag) {
  if (next_ns() > clock_->NowNs()) return false;
  *tag = pending_.front().tag;
  pending_.pop_front();
  return true;
}

void ModelSsd::StartWrite(SlotId, const BlockHeader& header, bool, std::byte*, uint64_t tag) {
  const uint64_t bytes = header.num_tokens * token_bytes_;
  bytes_written_ += bytes;
  queue_.Add(tag, static_cast<int64_t>(1e9 * bytes / model_.write_bytes_s),
             static_cast<int64_t>(1e9 * model_.latency_s));
}

void ModelSsd::StartRead(SlotId, const BlockHeader& header, uint32_t, uint32_t, std::byte*,
                         uint64_t tag) {
  const uint64_t bytes = header.num_tokens * token_bytes_;
  bytes_read_ += bytes;
  queue_.Add(tag, static_cast<int64_t>(1e9 * bytes / model_.read_bytes_s),
             static_cast<int64_t>(1e9 * model_.latency_s));
}

void ModelSsd::Poll(std::vector<SsdCompletion>* out, int64_t timeout_us) {
  if (timeout_us > 0 && queue_.size() > 0) clock_->MoveTo(queue_.next_ns());
  for (uint64_t tag = 0; queue_.Take(&tag);) out->push_back({tag, Status(), false});
}

void ModelCopy::Enqueue(const CopyRequest& request) {
  streams_[static_cast<int>(request.stream)].Add(request.tag, copy_ns_, 0);
}

void ModelCopy::Poll(std::vector<uint64_t>* tags, int64_t timeout_us) {
  if (timeout_us > 0 && in_flight() > 0) clock_->MoveTo(next_ns());
  for (DeviceQueue& stream : streams_) {
    for (uint64_t tag = 0; stream.Take(&tag);) tags->push_back(tag);
  }
}

}  // namespace cachedattn
