// When LaunchHopper (attn_kernels.h) can take a call.
#pragma once

#include "csrc/kernels/params.h"

namespace cachedattn::cuda {

// True if shapes, dtype and addresses suit the Hopper kernel; LaunchExtend takes the others. The
// device must have compute capability 9.0.
bool HopperTakes(const AttnParams& p);

}  // namespace cachedattn::cuda
