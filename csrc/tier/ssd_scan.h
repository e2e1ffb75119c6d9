// Finds the blocks of a file by the header pages of its slots.
#pragma once

#include "csrc/tier/ssd_file.h"

namespace cachedattn {

// Of two slots with one key the newer is kept; by slot.
std::vector<ScannedBlock> NewestOfEachKey(const std::vector<ScannedBlock>& blocks);

// Reads the header page of every slot, as many at a time as the engine takes. Fills `damaged`.
// As SsdTier::ScanHeaders; a page that cannot be read within `deadline_us` ends the scan (kIo).
Result<std::vector<ScannedBlock>> ReadHeaders(SsdFile* file, const SsdOptions& options,
                                              const ScanProgress& progress,
                                              std::vector<SlotDamage>* damaged);

}  // namespace cachedattn
