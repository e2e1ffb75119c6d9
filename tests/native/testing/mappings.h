// The memory of this process as the kernel sees it, and what of it goes into a core dump.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace cachedattn {

struct Mapping {
  uint64_t begin = 0, end = 0;
  bool readable = false;
  bool dumped = true;
};

inline std::vector<Mapping> Mappings() {
  std::vector<Mapping> mappings;
  std::ifstream in("/proc/self/smaps");
  for (std::string line; std::getline(in, line);) {
    const std::string first = line.substr(0, line.find(' '));
    if (const size_t dash = first.find('-'); dash != std::string::npos) {
      const std::string rights = line.substr(first.size() + 1, 4);
      mappings.push_back({std::stoull(first, nullptr, 16),
                          std::stoull(first.substr(dash + 1), nullptr, 16), rights[0] == 'r'});
    } else if (first == "VmFlags:") {
      std::istringstream flags(line.substr(first.size()));
      for (std::string flag; flags >> flag;) {
        if (flag == "dd" || flag == "io") mappings.back().dumped = false;
      }
    }
  }
  return mappings;
}

}  // namespace cachedattn
