// Opening a store on an SSD tier and a copy engine or a GPU that already exist: the production open
// and the tests' doubles meet here.
#pragma once

#include <memory>

#include "csrc/copy/gpu.h"
#include "csrc/store/attention_store.h"
#include "csrc/tier/ssd_tier.h"

namespace cachedattn {

// `ssd` may be nullptr: no SSD tier, whatever the options say. `copy` is used when
// options.device_bytes is not 0.
CA_API Result<std::unique_ptr<AttentionStore>> OpenStoreOn(const StoreOptions& options,
                                                           std::unique_ptr<SsdTier> ssd,
                                                           std::unique_ptr<CopyEngine> copy);
// The same with the device tier on `gpu`, whatever options.gpu says.
CA_API Result<std::unique_ptr<AttentionStore>> OpenStoreOnGpu(const StoreOptions& options,
                                                              std::unique_ptr<SsdTier> ssd,
                                                              std::unique_ptr<Gpu> gpu);

// A store that was closed on a disk which did not answer is parked until that has let go of its
// memory. Frees those that it has let go of; returns how many are left. AttentionStore::Open calls
// it. It polls their disks, on the calling thread.
CA_API size_t FreeParkedStores();

}  // namespace cachedattn
