# Bugs in the CUDA kernels, for the tests on the emulated device (see mutants.cmake).

# emu_mutant(NAME SOURCE FILE TEST FILTER OLD NEW): SOURCE and FILE lie in csrc/kernels/cuda.
function(emu_mutant name source file test filter old new)
  set(folder csrc/kernels/cuda)
  ca_mutant(${name} ${folder} ${source} ${file} ${test}
    "--gtest_filter=${filter};--gtest_fail_fast" "${old}" "${new}")
  if(mutant)
    target_link_libraries(${mutant} PRIVATE ca_emu GTest::gtest_main)
    get_target_property(sources ${mutant} SOURCES)
    list(GET sources 0 cu)
    set_source_files_properties(${cu} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  endif()
endfunction()

# kernel_mutant(NAME SOURCE FILE FILTER OLD NEW): for the attention test.
macro(kernel_mutant name source file filter old new)
  emu_mutant(${name} ${source} ${file} cuda_attention_test "${filter}" "${old}" "${new}")
endmacro()

# ---- sums ----

emu_mutant(sum_no_scramble leaf_sums.cu leaf_sums.cu cuda_sums_test *AreTheHosts
  [=[    sum = (sum ^ sum >> 47 ^ scramble) * kPrime32_1;]=] "")
emu_mutant(sum_of_unused leaf_sums.cu leaf_sums.cu cuda_sums_test *AreTheHosts
  [=[at % p.row_bytes >= used]=]
  [=[at % p.row_bytes > used]=])

# ---- decode ----

kernel_mutant(decode_no_wait attn_decode.cu attn_decode.h *TakesEveryLength/80
  [=[      CpAsyncWait<kPending>();
      SyncWarp();
      if (interleaved) {]=]
  [=[      SyncWarp();
      if (interleaved) {]=])
kernel_mutant(decode_no_sync_warp attn_decode.cu attn_decode.h *TakesEveryLength/80
  [=[      CpAsyncWait<kPending>();
      SyncWarp();
      AddValues(]=]
  [=[      CpAsyncWait<kPending>();
      AddValues(]=])
kernel_mutant(decode_no_barrier attn_decode.cu attn_decode.h *TakesEveryLength/80
  [=[  warp.StoreState();
  SyncThreads();]=]
  [=[  warp.StoreState();]=])
kernel_mutant(decode_no_zero_fill attn_decode.cu attn_decode.h *TakesEveryLength/80
  [=[from + i, row < count);]=]
  [=[from + i, true);]=])
kernel_mutant(decode_mask attn_decode.cu attn_decode.h *TakesEveryLength/80
  [=[k >= limits[r].y]=]
  [=[k > limits[r].y]=])
kernel_mutant(decode_window attn_decode.cu attn_decode.h *HidesKeysOutsideOfTheWindow/80
  [=[k < limits[r].x]=]
  [=[k <= limits[r].x]=])
kernel_mutant(decode_fragment attn_decode.cu attn_decode.h *TakesEveryLength/80
  [=[o[c][i] *= keep[i % 2]]=]
  [=[o[c][i] *= keep[i / 2]]=])
kernel_mutant(decode_merge attn_decode.cu attn_decode.h *TakesEveryLength/80
  [=[sum.x + state[w].x * x.x,]=]
  [=[sum.x + state[w].y * x.x,]=])

# ---- splits ----

kernel_mutant(splits_no_fence attn_decode.cu attn_tile.h *MergesManySplits/80
  [=[  ThreadFence();
  sync();]=]
  [=[  sync();]=])
kernel_mutant(splits_counter attn_decode.cu attn_tile.h *MergesManySplits/80
  [=[AtomicAdd(finished, 1) + 1]=]
  [=[AtomicAdd(finished, 1) + 2]=])

# ---- extend ----

kernel_mutant(extend_no_barrier attn_extend_bf16.cu attn_extend.h *TakesEveryLength/80
  [=[    CpAsyncWait<1>();
    SyncThreads();]=]
  [=[    CpAsyncWait<1>();]=])
kernel_mutant(extend_tail attn_extend_bf16.cu attn_extend_tiles.h *TakesEveryLength/80
  [=[static_cast<int>(key) < num_keys -]=]
  [=[static_cast<int>(key) + 1 < num_keys -]=])
kernel_mutant(extend_swizzle attn_extend_bf16.cu attn_extend.h *TakesEveryLength/80
  [=[2 * i ^ half ^ Shape::Turn(row)]=]
  [=[2 * i ^ half]=])
kernel_mutant(extend_mask attn_extend_bf16.cu attn_extend.h *TakesEveryLength/80
  [=[first_row + lane / 4 - seen.first_row -]=]
  [=[first_row + lane / 4 + 1 - seen.first_row -]=])

# ---- Hopper ----

kernel_mutant(hopper_no_proxy_fence attn_hopper.cu attn_hopper_feed.h *TakesEveryLength/90
  [=[    FenceProxyAsync();
]=] "")
kernel_mutant(hopper_parity attn_hopper.cu attn_hopper_feed.h *TakesEveryLength/90
  [=[static_cast<uint32_t>(n) / kStages % 2]=]
  [=[(static_cast<uint32_t>(n) / kStages + 1) % 2]=])
kernel_mutant(hopper_no_wait attn_hopper.cu attn_hopper.cu *TakesEveryLength/90
  [=[    WgmmaWait<1>();  // the logits]=] "")
kernel_mutant(hopper_overwrites attn_hopper.cu attn_hopper_feed.h *FollowsThePeakOverManyTiles/90
  [=[    Block::WaitEmpty(kVEmpty, n);
]=] "")
kernel_mutant(hopper_no_zeroes attn_hopper.cu attn_hopper_feed.h *TakesEveryLength/90
  [=[ZeroRows<D>(Block::V(n), t.kv_end - base)]=]
  [=[ZeroRows<D>(Block::V(n), t.kv_end - base + 1)]=])
