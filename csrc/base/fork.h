// Whether this process is the one that something was made in.
#pragma once

#include <cstdint>

namespace cachedattn {

// How many forks lie between the process that first asked and this one: a child differs from its
// parent. Costs a load, where getpid() enters the kernel.
uint32_t ForkDepth();

}  // namespace cachedattn
