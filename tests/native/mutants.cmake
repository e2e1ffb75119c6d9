# Bugs planted into the CUDA kernels, each of which the emulated attention test must report: a test
# that cannot fail proves nothing. Only the mutated file is copied and only what it is compiled into
# is built anew.

# ca_mutant(NAME SOURCE FILE FILTER OLD NEW): replaces OLD, which stands once in FILE, by NEW,
# builds SOURCE with it, and expects the tests that FILTER names to fail. SOURCE and FILE lie in
# csrc/kernels/cuda.
function(ca_mutant name source file filter old new)
  set(folder csrc/kernels/cuda)
  set(overlay ${CMAKE_CURRENT_BINARY_DIR}/mutants/${name})
  set_property(DIRECTORY APPEND PROPERTY
    CMAKE_CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/${folder}/${file})
  file(READ ${CMAKE_SOURCE_DIR}/${folder}/${file} text)
  string(REPLACE "${old}" "" without "${text}")
  string(LENGTH "${text}" length)
  string(LENGTH "${without}" left)
  string(LENGTH "${old}" once)
  math(EXPR removed "${length} - ${left}")
  if(NOT removed EQUAL once)
    # A failing test, so that the build goes on where somebody changes a kernel.
    add_test(NAME mutant_${name} COMMAND ${CMAKE_COMMAND} -E echo
      "The text to replace does not stand once in ${file}: ${old}")
    set_tests_properties(mutant_${name} PROPERTIES PASS_REGULAR_EXPRESSION "FAILED TEST")
    return()
  endif()
  string(REPLACE "${old}" "${new}" text "${text}")
  file(CONFIGURE OUTPUT ${overlay}/${folder}/${file} CONTENT "${text}" @ONLY)
  set(base ${CMAKE_SOURCE_DIR})
  if(source STREQUAL file)
    set(base ${overlay})
  endif()
  set_source_files_properties(${base}/${folder}/${source} PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  # Its functions are found before those of ca_emu.
  add_executable(mutant_${name}
    ${base}/${folder}/${source} $<TARGET_OBJECTS:cuda_attention_test>)
  target_include_directories(mutant_${name} BEFORE PRIVATE ${overlay})
  target_compile_options(mutant_${name} PRIVATE -O1 -fno-strict-aliasing -Wno-error)
  target_link_libraries(mutant_${name} PRIVATE ca_emu GTest::gtest_main)
  add_test(NAME mutant_${name}
    COMMAND mutant_${name} --gtest_filter=${filter} --gtest_fail_fast)
  set_tests_properties(mutant_${name} PROPERTIES
    PASS_REGULAR_EXPRESSION "FAILED TEST" TIMEOUT 100)
endfunction()

# ---- decode ----

ca_mutant(decode_no_wait attn_decode.cu attn_decode.h *TakesEveryLength/0
  [=[      CpAsyncWait<kPending>();
      SyncWarp();
      if (interleaved) {]=]
  [=[      SyncWarp();
      if (interleaved) {]=])
ca_mutant(decode_no_sync_warp attn_decode.cu attn_decode.h *TakesEveryLength/0
  [=[      CpAsyncWait<kPending>();
      SyncWarp();
      AddValues(]=]
  [=[      CpAsyncWait<kPending>();
      AddValues(]=])
ca_mutant(decode_no_barrier attn_decode.cu attn_decode.h *TakesEveryLength/0
  [=[  warp.StoreState();
  SyncThreads();]=]
  [=[  warp.StoreState();]=])
ca_mutant(decode_no_zero_fill attn_decode.cu attn_decode.h *TakesEveryLength/0
  [=[from + i, row < count);]=]
  [=[from + i, true);]=])
ca_mutant(decode_mask attn_decode.cu attn_decode.h *TakesEveryLength/0
  [=[k >= limits[r].y]=]
  [=[k > limits[r].y]=])
ca_mutant(decode_window attn_decode.cu attn_decode.h *HidesKeysOutsideOfTheWindow/0
  [=[k < limits[r].x]=]
  [=[k <= limits[r].x]=])
ca_mutant(decode_fragment attn_decode.cu attn_decode.h *TakesEveryLength/0
  [=[o[c][i] *= keep[i % 2]]=]
  [=[o[c][i] *= keep[i / 2]]=])
ca_mutant(decode_merge attn_decode.cu attn_decode.h *TakesEveryLength/0
  [=[sum.x + state[w].x * x.x,]=]
  [=[sum.x + state[w].y * x.x,]=])

# ---- splits ----

ca_mutant(splits_no_fence attn_decode.cu attn_tile.h *MergesManySplits/0
  [=[  ThreadFence();
  sync();]=]
  [=[  sync();]=])
ca_mutant(splits_counter attn_decode.cu attn_tile.h *MergesManySplits/0
  [=[AtomicAdd(finished, 1) + 1]=]
  [=[AtomicAdd(finished, 1) + 2]=])

# ---- extend ----

ca_mutant(extend_no_barrier attn_extend_bf16.cu attn_extend.h *TakesEveryLength/0
  [=[    CpAsyncWait<1>();
    SyncThreads();]=]
  [=[    CpAsyncWait<1>();]=])
ca_mutant(extend_tail attn_extend_bf16.cu attn_extend_tiles.h *TakesEveryLength/0
  [=[static_cast<int>(key) < num_keys -]=]
  [=[static_cast<int>(key) + 1 < num_keys -]=])
ca_mutant(extend_swizzle attn_extend_bf16.cu attn_extend.h *TakesEveryLength/0
  [=[2 * i ^ half ^ Shape::Turn(row)]=]
  [=[2 * i ^ half]=])
ca_mutant(extend_mask attn_extend_bf16.cu attn_extend.h *TakesEveryLength/0
  [=[first_row + lane / 4 - seen.first_row -]=]
  [=[first_row + lane / 4 + 1 - seen.first_row -]=])

# ---- Hopper ----

ca_mutant(hopper_no_proxy_fence attn_hopper.cu attn_hopper_feed.h *TakesEveryLength/1
  [=[    FenceProxyAsync();
]=] "")
ca_mutant(hopper_parity attn_hopper.cu attn_hopper_feed.h *TakesEveryLength/1
  [=[static_cast<uint32_t>(n) / kStages % 2]=]
  [=[(static_cast<uint32_t>(n) / kStages + 1) % 2]=])
ca_mutant(hopper_no_wait attn_hopper.cu attn_hopper.cu *TakesEveryLength/1
  [=[    WgmmaWait<1>();  // the logits]=] "")
ca_mutant(hopper_overwrites attn_hopper.cu attn_hopper_feed.h *FollowsThePeakOverManyTiles/1
  [=[    Block::WaitEmpty(kVEmpty, n);
]=] "")
ca_mutant(hopper_no_zeroes attn_hopper.cu attn_hopper_feed.h *TakesEveryLength/1
  [=[ZeroRows<D>(Block::V(n), t.kv_end - base)]=]
  [=[ZeroRows<D>(Block::V(n), t.kv_end - base + 1)]=])
