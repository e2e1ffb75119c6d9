// Runs part of a test in a child process, for what would change the test program itself: seccomp
// filters, dropped rights, mounts.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>
#include <string>

namespace cachedattn {

// `body` returns "" for success, "skip: <reason>", or what went wrong. Returns the same, or how
// the child died.
inline std::string RunInChild(const std::function<std::string()>& body) {
  int pipe_fds[2];
  if (::pipe2(pipe_fds, O_CLOEXEC) != 0) return "pipe failed";
  const pid_t pid = ::fork();
  if (pid < 0) return "fork failed";
  if (pid == 0) {
    const std::string text = body();
    const ssize_t written = ::write(pipe_fds[1], text.data(), text.size());
    ::_exit(written == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }
  ::close(pipe_fds[1]);
  std::string text;
  char buffer[512];
  ssize_t count;
  while ((count = ::read(pipe_fds[0], buffer, sizeof(buffer))) > 0) text.append(buffer, count);
  ::close(pipe_fds[0]);
  int status = 0;
  ::waitpid(pid, &status, 0);
  if (status != 0) return "the child ended with status " + std::to_string(status) + ": " + text;
  return text;
}

// Use at the top level of a test: skips or fails it by the child's answer.
#define EXPECT_CHILD_OK(...)                                          \
  do {                                                                \
    const std::string answer = ::cachedattn::RunInChild(__VA_ARGS__); \
    if (answer.rfind("skip: ", 0) == 0) GTEST_SKIP() << answer;       \
    EXPECT_EQ(answer, "");                                            \
  } while (false)

// In a child: from here on its mounts are its own, and gone when it ends. "" or "skip: <reason>".
inline std::string OwnMounts() {
  if (::unshare(CLONE_NEWNS) == 0 &&
      ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0) {
    return "";
  }
  return std::string("skip: no mount namespace of its own: ") + std::strerror(errno);
}

// In a child: mounts a file system on `path` that nobody else sees. "" or "skip: <reason>".
inline std::string MountPrivately(const char* type, const std::string& path,
                                  const std::string& options) {
  const std::string error = OwnMounts();
  if (!error.empty()) return error;
  if (::mount("none", path.c_str(), type, 0, options.c_str()) != 0) {
    return std::string("skip: cannot mount ") + type + ": " + std::strerror(errno);
  }
  return "";
}

// In a child: from here on without root's rights.
inline void DropRoot() {
  if (::geteuid() == 0 && (::setgid(65534) != 0 || ::setuid(65534) != 0)) ::_exit(2);
}

}  // namespace cachedattn
