// Machines that refuse io_uring: the store works, and says why it is slower.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstddef>

#include "tests/native/testing/child.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

// From here on, `call` fails with `error` in this process.
bool Refuse(uint32_t call, uint32_t error) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{sizeof(code) / sizeof(code[0]), code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// A store on an automatic engine: "" if it took the threads, says `reason`, and round-trips.
std::string CheckThreads(const std::string& directory, const std::string& reason) {
  SsdOptions options = SmallStore(directory);
  Result<std::unique_ptr<SsdTier>> tier = SsdTier::Open(options);
  if (!tier.ok()) return tier.status().message();
  if (std::string(tier.value()->io_name()) != "threads") return "io_uring was not refused";
  if (tier.value()->io_why().find(reason) == std::string::npos) return tier.value()->io_why();
  Status status = WriteBlock(tier.value().get(), 1, 1);
  if (status.ok()) status = ReadBlock(tier.value().get(), 1, 1);
  if (!status.ok()) return status.message();
  tier.value().reset();

  options.io.kind = IoKind::kUring;
  status = SsdTier::Open(options).status();
  const bool clear = status.message().find("io_uring was asked for") != std::string::npos &&
                     status.message().find(reason) != std::string::npos;
  return status.code() == Code::kIo && clear ? "" : "by name: " + status.message();
}

struct Refusal {
  uint32_t call;
  uint32_t error;
  const char* reason;
};

class IoFallbackTest : public ::testing::TestWithParam<Refusal> {};

TEST_P(IoFallbackTest, ThreadsTakeOverAndSayWhy) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    if (!Refuse(GetParam().call, GetParam().error)) return "skip: seccomp filters are refused";
    return CheckThreads(dir / "kv", GetParam().reason);
  });
}

INSTANTIATE_TEST_SUITE_P(Refusals, IoFallbackTest,
                         ::testing::Values(Refusal{SYS_io_uring_setup, EPERM,
                                                   "io_uring_setup: Operation not permitted"},
                                           Refusal{SYS_io_uring_setup, ENOSYS,
                                                   "io_uring_setup: Function not implemented"},
                                           Refusal{SYS_io_uring_enter, EPERM,
                                                   "io_uring_enter: Operation not permitted"}));

}  // namespace
}  // namespace cachedattn
