# Bugs in the store, its tiers and its I/O (see mutants.cmake).

# file_mutant(NAME FILE TEST LIBRARIES ARGS OLD NEW): FILE lies in csrc.
function(file_mutant name file test libraries args old new)
  get_filename_component(folder csrc/${file} DIRECTORY)
  get_filename_component(source ${file} NAME)
  ca_mutant(${name} ${folder} ${source} ${source} ${test} "${args}" "${old}" "${new}")
  if(mutant)
    target_link_libraries(${mutant} PRIVATE ${libraries}
      Liburing::Liburing XxHash::XxHash CryptoStatic::CryptoStatic)
  endif()
endfunction()

# store_mutant(NAME FILE TEST FILTER OLD NEW): for a test program.
macro(store_mutant name file test filter old new)
  file_mutant(${name} ${file} ${test} "ca_core;GTest::gtest_main"
    "--gtest_filter=${filter};--gtest_fail_fast" "${old}" "${new}")
endmacro()

# sim_mutant(NAME FILE MODE OLD NEW): for some schedules of the simulation.
macro(sim_mutant name file mode old new)
  file_mutant(${name} ${file} store_sim ca_sim "--mode=${mode};--n=2000" "${old}" "${new}")
endmacro()

# ---- sums ----

store_mutant(no_payload_sum tier/ssd_format.cc ssd_damage_test *AFlippedPayloadByteIsFound*
  [=[ == page.seals[layer];]=]
  [=[ == page.seals[layer] || page.version != 0;]=])
store_mutant(sum_of_half base/slice_sum.cc ssd_damage_test *AFlippedPayloadByteIsFound*
  [=[SliceSum SumOfSlice(std::span<const std::byte> slice) {]=]
  [=[SliceSum SumOfSlice(std::span<const std::byte> slice) {
  slice = slice.first(slice.size() / 2);]=])
store_mutant(sum_of_other_bytes tier/ssd_format.cc ssd_damage_test *SealsDependOnSum*
  [=[XXH3_128bits_withSeed(sum.data(), sum.size(), seed)]=]
  [=[XXH3_128bits_withSeed(sum.data(), 0 * sum.size(), seed)]=])
store_mutant(sum_without_key tier/ssd_format.cc ssd_damage_test *SealsDependOnSumStoreKeyAndLayer
  [=[place = {uuid, key.bytes, layer};]=]
  [=[place = {uuid, {}, layer + 0 * key.bytes[0]};]=])
store_mutant(sum_without_layer tier/ssd_format.cc ssd_damage_test *SealsDependOnSumStoreKeyAndLayer
  [=[place = {uuid, key.bytes, layer};]=]
  [=[place = {uuid, key.bytes, 0 * layer};]=])
store_mutant(sum_without_store tier/ssd_format.cc ssd_damage_test *SealsDependOnSumStoreKeyAndLayer
  [=[place = {uuid, key.bytes, layer};]=]
  [=[place = {{}, key.bytes, layer + 0 * uuid[0]};]=])
store_mutant(no_header_sum tier/ssd_format.cc ssd_damage_test *AnyFlippedBitOfAHeaderIsFound
  [=[!Same(page.checksum, PageSum(page, uuid))]=]
  [=[!Same(page.checksum, page.checksum)]=])
store_mutant(no_superblock_sum tier/ssd_format.cc ssd_damage_test *AnyFlippedBitOfASuperblock*
  [=[Same(superblock.checksum, XXH3_]=]
  [=[Same(superblock.checksum, superblock.checksum + 0 * XXH3_]=])

# ---- headers, generations ----

store_mutant(key_not_compared tier/ssd_tier.cc ssd_damage_test *SwappedAndOldSlotsAreFound
  [=[if (HeaderOf(page) == op.header)]=]
  [=[if (HeaderOf(page).num_tokens == op.header.num_tokens)]=])
store_mutant(slot_not_compared tier/ssd_format.cc ssd_damage_test *
  [=[} else if (page.slot != slot) {]=]
  [=[} else if (page.slot != slot && page.depth == UINT32_MAX) {]=])
store_mutant(generations_ignored tier/ssd_scan.cc ssd_tier_test *TheNewerOfTwoSlots*
  [=[if (!added && block.header.generation > entry->second->header.generation) {]=]
  [=[if (!added && block.header.generation == 0) {]=])
store_mutant(older_superblock tier/ssd_file.cc ssd_damage_test *OneSuperblockCopyIsEnough
  [=[copy->generation > best->generation]=]
  [=[copy->generation < best->generation]=])
store_mutant(stale_index tier/ssd_format.cc ssd_deadline_test *AnEarlierIndexIsNotUsed
  [=[place = {uuid, generation, number};]=]
  [=[place = {uuid, 0 * generation, number};]=])
store_mutant(version_not_compared tier/ssd_file.cc ssd_open_test *RefusesAnotherFormatVersion
  [=[if (copy->version != kSsdVersion) {]=]
  [=[if (copy->version == 0) {]=])

# ---- operations that fail, that end late ----

store_mutant(short_is_full tier/ssd_tier.cc ssd_damage_test *AFileThatShrinksWhileOpenIsAResult
  [=[if (result != static_cast<int64_t>(size)) {]=]
  [=[if (result < 0) {]=])
store_mutant(error_dropped tier/ssd_tier.cc ssd_tier_test *AWriteErrorIsAResult*
  [=[ErrnoStatus(op.Where(), -result)]=]
  [=[Status()]=])
store_mutant(no_second_read tier/ssd_tier.cc ssd_tier_test *AReadErrorIsReadAgainOnce*
  [=[op->reread || op->probe]=]
  [=[op->num_layers > 0 || op->probe]=])
store_mutant(failed_header_stays tier/ssd_tier.cc ssd_tier_test *WithoutAHeaderNoLayerIsVerified*
  [=[if (!ok) std::memset(]=]
  [=[if (!ok && op.late) std::memset(]=])
store_mutant(overtakes_its_header tier/ssd_tier.cc ssd_tier_test *AGroupThatOvertakesTheHeader*
  [=[} else if (!op.has_header() && HeaderInFlight(op.host_slot)) {]=]
  [=[} else if (!op.has_header() && op.late && HeaderInFlight(op.host_slot)) {]=])
store_mutant(late_buffer_given_back tier/ssd_tier.cc ssd_deadline_test *ALateReadFailsThenGives*
  [=[out->push_back({op.tag, std::move(status), true});]=]
  [=[out->push_back({op.tag, std::move(status), false});]=])
store_mutant(late_is_retried tier/ssd_tier.cc ssd_deadline_test *AFailedReadIsNotRepeated*
  [=[if (op->late || clock_.NowNs() >= op->deadline_ns) return false;]=] "")
store_mutant(lock_not_taken io/block_file.cc ssd_open_test *ASecondOpenerIsTurnedAway
  [=[::flock(lock_.get(), LOCK_EX | LOCK_NB) == 0]=]
  [=[lock_.ok()]=])

# ---- keys ----

store_mutant(tenant_not_in_key base/block_key.cc chain_test *KeysTellCutsTokensAndTenantsApart
  [=[.Text(kTagTenant, tenant);]=]
  [=[.Text(kTagTenant, tenant.substr(0, 0));]=])
store_mutant(cuts_not_in_key base/block_key.cc chain_test *KeysTellCutsTokensAndTenantsApart
  [=[.Bytes(kTagCuts, AsBytes(cuts))]=]
  [=[.Bytes(kTagCuts, AsBytes(cuts.first(0)))]=])
store_mutant(parent_not_in_key base/block_key.cc block_key_test *EveryFieldCounts
  [=[.Bytes(kTagParent, parent.bytes)]=]
  [=[.Bytes(kTagParent, std::span(parent.bytes).first(0))]=])

# ---- who may use which bytes when: the simulation reads, and judges, every byte of a turn ----

sim_mutant(read_not_awaited store/preload.cc honest
  [=[  started_.emplace(tag, std::move(piece));]=]
  [=[  for (uint32_t i = 0; i < num_layers; ++i) piece.fill->landed.set(first_layer + i);
  started_.emplace(tag, std::move(piece));]=])
sim_mutant(copy_not_awaited store/preload.cc honest
  [=[    started_.emplace(request.tag, std::move(piece));]=]
  [=[    Landed(piece);
    started_.emplace(request.tag, std::move(piece));]=])
sim_mutant(save_not_awaited store/save.cc honest
  [=[save->num_landed < layout.num_layers) return;]=]
  [=[save->num_landed + 1 < layout.num_layers) return;]=])
sim_mutant(layer_not_awaited store/sequence.cc honest
  [=[Visible(entry.fill.get(), layer) && !missing]=]
  [=[Visible(entry.fill.get(), 0) && !missing]=])
sim_mutant(jumps_too_early store/sequence.cc honest
  [=[if (recompute_end_ == 0 || context_len_ < recompute_end_) return;]=]
  [=[if (recompute_end_ == 0) return;]=])
sim_mutant(released_before_use store/preload.cc honest
  [=[  fill->status = status;]=]
  [=[  fill->status = status;
  (fill->private_slot ? fill->private_slot : fill->block->copy(fill->tier).slot).Release();]=])
sim_mutant(published_before_write store/directory.cc honest
  [=[  CA_CHECK(block->copy(tier).state == from);
  Change(block, tier, [to](Copy* copy) {
    copy->state = to;]=]
  [=[  const bool early = tier == Tier::kSsd && from == CopyState::kFilling;
  CA_CHECK(block->copy(tier).state == (early ? CopyState::kReady : from));
  Change(block, tier, [to, tier](Copy* copy) {
    copy->state = tier == Tier::kSsd && to == CopyState::kFilling ? CopyState::kReady : to;]=])
sim_mutant(failed_write_published store/write_behind.cc honest
  [=[if (done.status.ok()) {]=]
  [=[if (done.status.ok() || done.status.code() == Code::kIo) {]=])
sim_mutant(failed_read_published store/preload.cc hostile
  [=[} else if (done.status.ok()) {]=]
  [=[} else if (done.status.ok() || done.status.code() == Code::kIo) {]=])
sim_mutant(late_buffer_reused store/preload.cc honest
  [=[    if (fill->late_pieces++ == 0) ++num_quarantined_;
    Fail(fill.get(), done.status);
    return;]=]
  [=[    if (fill->late_pieces++ == 0) ++num_quarantined_;
    Fail(fill.get(), done.status);
    (fill->private_slot ? fill->private_slot : fill->block->copy(fill->tier).slot).Release();
    return;]=])
sim_mutant(not_pinned store/directory.cc honest
  [=[    Change(block.get(), tier, [](Copy* c) { c->pins = 1; });]=]
  [=[    copy.pins = 1;]=])
sim_mutant(no_payload_sum_sim tier/ssd_format.cc hostile
  [=[ == page.seals[layer];]=]
  [=[ == page.seals[layer] || page.version != 0;]=])
sim_mutant(given_up_save_reads_on store/sequence.cc honest
  [=[if (entry.pin) entry.save->source = std::move(entry.pin);]=]
  [=[]=])
sim_mutant(saved_from_a_fill store/sequence.cc honest
  [=[if (layer == 0 && !entry.fill) entry.save]=]
  [=[if (layer == 0) entry.save]=])

# ---- a GPU's queues ----

store_mutant(load_not_awaited copy/gpu_copy_engine.cc gpu_store_test *NothingOvertakes*
  [=[    gpu_->Wait(Gpu::Queue::kCompute, batch->mark);]=] "")
store_mutant(saved_before_computed copy/gpu_copy_engine.cc gpu_store_test *NothingOvertakes*
  [=[stream == CopyStream::kSave || places_changed_]=]
  [=[places_changed_]=])
store_mutant(place_given_too_early store/sequence.cc gpu_store_test *NothingOvertakes*
  [=[  block_table_.clear();
  if (core_->tiers.copy != nullptr) core_->tiers.copy->OrderLoadsAfterCompute();]=]
  [=[  block_table_.clear();]=])
store_mutant(layer_not_awaited_gpu store/preload.cc gpu_store_test *NothingOvertakes*
  [=[OrderComputeAfter(fill->load_tags[layer])]=]
  [=[OrderComputeAfter(fill->load_tags[0])]=])
store_mutant(sum_not_awaited copy/gpu_copy_engine.cc gpu_store_test *NothingOvertakes*
  [=[      if (!batch.leaf_sums.empty()) gpu_->Sum(copies, batch.leaf_sums);
      if (stream == CopyStream::kSave || places_changed_) {
        const Gpu::Mark computed = gpu_->Record(Gpu::Queue::kCompute);]=]
  [=[      if (stream == CopyStream::kSave || places_changed_) {
        const Gpu::Mark computed = gpu_->Record(Gpu::Queue::kCompute);
        if (!batch.leaf_sums.empty()) gpu_->Sum(copies, batch.leaf_sums);]=])
store_mutant(sum_of_the_copy store/write_behind.cc gpu_store_test *WhatWasNotComputed*
  [=[block->copy(Tier::kDram).sealed,]=]
  [=[false,]=])
store_mutant(sum_of_the_copy_encrypted tier/block_cipher.cc gpu_store_test *WhatWasNotComputed*
  [=[      page.seals[aad.layer] = {};]=] "")

# ---- the table of blocks ----

store_mutant(hole_not_closed store/block_table.cc block_table_test *HoldsWhatAMapHolds
  [=[    places_[hole] = std::move(places_[i]);
    hole = i;]=]
  [=[    break;]=])
store_mutant(hash_for_key store/block_table.cc block_table_test *HoldsWhatAMapHolds
  [=[places_[i].hash == hash && places_[i].block->key == key) return]=]
  [=[places_[i].hash == hash) return]=])
store_mutant(bisection_off_by_one store/lookup.cc lookup_test *TheEndIsTheLastBlock*
  [=[full = middle + 1;]=]
  [=[missing = middle;]=])
