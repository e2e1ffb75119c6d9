// The one source of libcachedattn.so itself; everything else comes from the static core.
#include "csrc/base/types.h"

extern "C" CA_API const char* cachedattn_version() { return CACHEDATTN_VERSION; }
