// Who may open a store's files, and what is refused in their place (the lock, links, owners).
#include <signal.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <filesystem>
#include <map>

#include "csrc/io/direct_file.h"
#include "tests/native/testing/child.h"
#include "tests/native/testing/ssd_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

namespace fs = std::filesystem;

Status OpenStatus(const SsdOptions& options) { return SsdTier::Open(options).status(); }

// Both ends of a pipe.
struct Pipe {
  Pipe() {
    int fds[2];
    CA_CHECK(::pipe2(fds, O_CLOEXEC) == 0);
    in = UniqueFd(fds[0]);
    out = UniqueFd(fds[1]);
  }
  void Send(char byte) { CA_CHECK(::write(out.get(), &byte, 1) == 1); }
  // 0: the other end is closed.
  char Receive() {
    char byte = 0;
    return ::read(in.get(), &byte, 1) == 1 ? byte : '\0';
  }
  UniqueFd in, out;
};

TEST(StoreLock, OneOfManyProcessesWins) {
  constexpr int kProcesses = 200;
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  Pipe start, answers, end;
  std::vector<pid_t> children;
  for (int i = 0; i < kProcesses; ++i) {
    children.push_back(::fork());
    ASSERT_GE(children.back(), 0);
    if (children.back() != 0) continue;
    start.out = UniqueFd();
    end.out = UniqueFd();
    (void)start.Receive();  // all at once, when the parent closes it
    auto tier = SsdTier::Open(options);
    const Code code = tier.status().code();
    answers.Send(code == Code::kOk ? 'w' : code == Code::kBusy ? 'b' : 'e');
    (void)end.Receive();  // the winner stays until all have tried
    ::_exit(0);
  }
  start.out = UniqueFd();
  answers.out = UniqueFd();
  std::map<char, int> count;
  for (int i = 0; i < kProcesses; ++i) ++count[answers.Receive()];
  end.out = UniqueFd();
  for (pid_t child : children) ::waitpid(child, nullptr, 0);
  EXPECT_EQ(count['w'], 1);
  EXPECT_EQ(count['b'], kProcesses - 1);
  EXPECT_TRUE(OpenStatus(options).ok()) << "the winner is gone";
}

TEST(StoreLock, ASecondOpenerIsToldAtOnce) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  auto tier = MustOpen(options);
  int64_t fastest = INT64_MAX;  // of a few: others use this machine too
  for (int i = 0; i < 10; ++i) {
    const int64_t begin = SystemClock().NowNs();
    EXPECT_EQ(OpenStatus(options).code(), Code::kBusy);
    fastest = std::min(fastest, SystemClock().NowNs() - begin);
  }
  EXPECT_LT(fastest, 100'000'000) << "ns";
}

// A process that holds the store, with a child of its own that it was forked from; both are idle.
TEST(StoreLock, IsGoneWithAKilledProcessWhateverItsChildrenDo) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  Pipe ready, end;
  const pid_t holder = ::fork();
  ASSERT_GE(holder, 0);
  if (holder == 0) {
    end.out = UniqueFd();
    auto tier = SsdTier::Open(options);
    if (!tier.ok()) ::_exit(1);
    if (::fork() == 0) {
      ready.Send('r');
      (void)end.Receive();
      ::_exit(0);
    }
    ::pause();
  }
  ASSERT_EQ(ready.Receive(), 'r');
  EXPECT_EQ(OpenStatus(options).code(), Code::kBusy);
  ::kill(holder, SIGKILL);
  ::waitpid(holder, nullptr, 0);
  EXPECT_TRUE(OpenStatus(options).ok()) << "the grandchild lives, and holds no lock";
}

TEST(StoreLock, IsGoneAfterCloseWhateverTheChildrenDo) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  auto tier = MustOpen(options);
  Pipe ready, end;
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    end.out = UniqueFd();
    ready.Send('r');
    (void)end.Receive();
    ::_exit(0);
  }
  ASSERT_EQ(ready.Receive(), 'r');
  EXPECT_EQ(OpenStatus(options).code(), Code::kBusy) << "the child has not opened it";
  tier.reset();
  EXPECT_TRUE(OpenStatus(options).ok());
  end.out = UniqueFd();
  ::waitpid(child, nullptr, 0);
}

TEST(StoreFiles, ArePrivateWhateverTheUmask) {
  TempDir dir;
  EXPECT_CHILD_OK([&]() -> std::string {
    ::umask(0);
    if (!OpenStatus(SmallStore(dir / "kv")).ok()) return "not made";
    const auto mode = [&](const char* name) { return fs::status(dir / name).permissions(); };
    const fs::perms file = fs::perms::owner_read | fs::perms::owner_write;
    if (mode("kv") != fs::perms::owner_all) return "the directory is not private";
    return mode("kv/blocks") == file && mode("kv/LOCK") == file ? "" : "a file is not private";
  });
}

// A store whose file `name` was replaced by what `plant(path)` puts there is refused, with a
// message that names the file and holds `text`; nothing is written through it.
void ExpectRefused(const char* name, const std::string& text,
                   const std::function<void(const std::string&)>& plant) {
  SCOPED_TRACE(name);
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  MustOpen(options).reset();
  const std::string path = options.directory + "/" + name;
  fs::rename(path, dir / "victim");
  std::ofstream(dir / "victim") << "precious";
  plant(path);
  const Status status = OpenStatus(options);
  EXPECT_EQ(status.code(), Code::kIo);
  EXPECT_NE(status.message().find(path), std::string::npos) << status.message();
  EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  std::string left;
  std::ifstream(dir / "victim") >> left;
  EXPECT_EQ(left, "precious");
}

class PlantedTest : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Files, PlantedTest, ::testing::Values("blocks", "LOCK"),
                         [](const auto& info) { return std::string(info.param); });

std::string Victim(const std::string& path) {
  return fs::path(path).parent_path().parent_path() / "victim";
}

TEST_P(PlantedTest, LinksAreRefused) {
  ExpectRefused(GetParam(), "is a symbolic link",
                [](const std::string& path) { fs::create_symlink(Victim(path), path); });
  ExpectRefused(GetParam(), "has another name (a hard link)",
                [](const std::string& path) { fs::create_hard_link(Victim(path), path); });
}

TEST_P(PlantedTest, WhatIsNoFileIsRefused) {
  ExpectRefused(GetParam(), "is not a regular file",
                [](const std::string& path) { ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0); });
  ExpectRefused(GetParam(), "Is a directory",
                [](const std::string& path) { ASSERT_TRUE(fs::create_directory(path)); });
}

TEST_P(PlantedTest, ADeviceIsRefused) {
  TempDir dir;
  if (::mknod((dir / "null").c_str(), S_IFCHR | 0600, makedev(1, 3)) != 0) {
    GTEST_SKIP() << "skip: cannot make a device: " << std::strerror(errno);
  }
  ExpectRefused(GetParam(), "", [](const std::string& path) {
    ASSERT_EQ(::mknod(path.c_str(), S_IFCHR | 0600, makedev(1, 3)), 0);
  });
}

TEST_P(PlantedTest, AFileThatOthersMayWriteIsRefused) {
  ExpectRefused(GetParam(), "chmod go-w", [](const std::string& path) {
    std::ofstream(path) << "x";
    ASSERT_EQ(::chmod(path.c_str(), 0620), 0);
  });
}

TEST_P(PlantedTest, AFileOfAnotherUserIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "skip: only root gives files away";
  ExpectRefused(GetParam(), "belongs to user 65534, this process runs as user 0",
                [](const std::string& path) {
                  std::ofstream(path) << "x";
                  ASSERT_EQ(::chown(path.c_str(), 65534, 65534), 0);
                });
}

TEST(StoreFiles, ADirectoryOfOthersIsRefused) {
  TempDir dir;
  const SsdOptions options = SmallStore(dir / "kv");
  MustOpen(options).reset();
  const auto refuse = [&](const std::string& text) {
    const Status status = OpenStatus(options);
    EXPECT_EQ(status.code(), Code::kIo);
    EXPECT_NE(status.message().find(options.directory + " " + text), std::string::npos)
        << status.message();
  };
  for (mode_t mode : {0770, 0702, 01777}) {
    ASSERT_EQ(::chmod(options.directory.c_str(), mode), 0);
    refuse("can be written to by other users: chmod go-w " + options.directory);
  }
  ASSERT_EQ(::chmod(options.directory.c_str(), 0755), 0);
  EXPECT_TRUE(OpenStatus(options).ok()) << "others may see that it is there";
  if (::geteuid() != 0) GTEST_SKIP() << "skip: only root gives directories away";
  ASSERT_EQ(::chown(options.directory.c_str(), 65534, 65534), 0);
  refuse("belongs to user 65534, this process runs as user 0");
  EXPECT_TRUE(ReadSsdInfo(options.directory).ok()) << "to look is allowed to whom the modes allow";
}

}  // namespace
}  // namespace cachedattn
