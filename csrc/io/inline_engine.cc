#include "csrc/io/inline_engine.h"

#include <algorithm>
#include <vector>

#include "csrc/base/check.h"
#include "csrc/io/thread_engine.h"

namespace cachedattn {
namespace {

class InlineEngine final : public IoEngine {
 public:
  InlineEngine(int fd, uint32_t depth) : fd_(fd), depth_(depth) { finished_.reserve(depth); }

  void Submit(const IoRequest& request) override {
    CA_CHECK(in_flight() < depth_);
    finished_.push_back({request.tag, Execute(fd_, request)});
  }

  size_t Poll(std::span<IoCompletion> out, int64_t) override {
    const size_t count = std::min(out.size(), finished_.size());
    std::copy_n(finished_.begin(), count, out.begin());
    finished_.erase(finished_.begin(), finished_.begin() + static_cast<ptrdiff_t>(count));
    return count;
  }

  uint32_t depth() const override { return depth_; }
  uint32_t in_flight() const override { return static_cast<uint32_t>(finished_.size()); }
  const char* name() const override { return "inline"; }
  const std::string& why() const override { return why_; }

 private:
  const int fd_;
  const uint32_t depth_;
  std::vector<IoCompletion> finished_;
  const std::string why_ = "pread/pwrite in the calling thread, as asked for";
};

}  // namespace

std::unique_ptr<IoEngine> OpenInlineEngine(int fd, const IoOptions& options) {
  return std::make_unique<InlineEngine>(fd, options.depth);
}

}  // namespace cachedattn
