// BlockFile: the file that an SSD tier lies in. All of its bytes move through an IoEngine; what is
// left here is its length and its name. A simulated disk is another BlockFile (tests/native).
#pragma once

#include <memory>
#include <string>

#include "csrc/io/io_engine.h"

namespace cachedattn {

class CA_API BlockFile {
 public:
  virtual ~BlockFile() = default;

  virtual uint64_t size() const = 0;
  // Makes the file exactly `bytes` long. What is added reads as zeros, and its space is reserved
  // where the file system can, so that no later write finds the disk full. kIo with the errno
  // text; the length is then what it was.
  virtual Status Resize(uint64_t bytes) = 0;

  virtual Result<std::unique_ptr<IoEngine>> OpenEngine(const IoOptions& options) = 0;

  virtual const std::string& path() const = 0;  // for messages
  virtual bool direct() const = 0;              // past the page cache
};

// The file `blocks` in `directory`. To write: makes the directory with mode 0700 and an empty file
// with mode 0600 where they are absent, and holds an exclusive lock on `directory`/LOCK until the
// file is closed. `read_only` takes no lock and makes nothing. kBusy: open in another process or
// engine; kIo with errno text; kInvalidArgument: an empty path.
Result<std::unique_ptr<BlockFile>> OpenStoreFile(const std::string& directory, bool read_only);

}  // namespace cachedattn
