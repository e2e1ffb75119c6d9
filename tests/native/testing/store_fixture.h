// A small store, and turns over it that check every byte of their context (player.h).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "csrc/store/attention_store.h"
#include "csrc/store/open_store.h"
#include "csrc/tier/ssd_format.h"
#include "tests/native/testing/master_key.h"
#include "tests/native/testing/player.h"
#include "tests/native/testing/ssd_fixture.h"

namespace cachedattn {

constexpr uint32_t kBlock = 16;

// Four layers of 2048 bytes in slices of 4096, so that there is padding.
inline KvLayout TinyLayout() { return {4, 2, 16, kBlock, DType::kBFloat16}; }

// Slots per tier; 0: no such tier.
struct Sizes {
  uint32_t dram = 16;
  uint32_t ssd = 0;
  uint32_t device = 0;
};

inline StoreOptions TinyOptions(const Sizes& sizes, const std::string& path = "") {
  StoreOptions options;
  options.layout = TinyLayout();
  options.identity.bytes[3] = 9;
  options.model_name = "tiny";
  options.dram_bytes = sizes.dram * options.layout.host_slot_bytes();
  options.device_bytes = sizes.device * options.layout.payload_bytes();
  if (sizes.ssd != 0) {
    options.ssd_bytes = SsdFileBytes(options.layout, sizes.ssd);
    options.path = path;
  }
  options.dram_reserve = 0;
  options.io_depth = 16;
  options.io_deadline_us = kPatientUs;
  options.poison = true;
  return options;
}

// What AttentionStore::Open passes on, for tests that change it.
inline SsdOptions SsdOptionsOf(const StoreOptions& options) {
  SsdOptions ssd;
  ssd.directory = options.path;
  ssd.layout = options.layout;
  ssd.identity = options.identity;
  ssd.model_name = options.model_name;
  ssd.max_bytes = options.ssd_bytes;
  ssd.io.depth = options.io_depth;
  ssd.io_deadline_us = options.io_deadline_us;
  ssd.clock = options.clock;
  if (!options.master_key_file.empty()) ssd.keys = MustLoad(options.master_key_file);
  return ssd;
}

inline std::unique_ptr<AttentionStore> MustOpenStore(const StoreOptions& options) {
  auto store = AttentionStore::Open(options);
  if (!store.ok()) {
    ADD_FAILURE() << store.status().message();
    std::abort();
  }
  return std::move(store.value());
}

// `count` tokens that differ by seed from the first on.
inline Tokens MakeTokens(uint32_t count, uint32_t seed) {
  Tokens tokens(count);
  for (uint32_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<TokenId>((seed * 7919u + i * 104729u) % 32000);
  }
  return tokens;
}

inline Tokens operator+(Tokens left, const Tokens& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

// A player whose findings are failures of the test.
class Turn : public Player {
 public:
  Turn(AttentionStore* store, Tokens tokens, const Truncation& truncation = {},
       const std::string& tenant = "t")
      : Player(store, std::move(tokens), truncation, tenant) {}

  // False: no room.
  bool Begin(uint32_t max_history = UINT32_MAX) {
    const Status status = Player::Begin(max_history);
    ExpectRight();
    if (status.ok()) return true;
    EXPECT_EQ(status.code(), Code::kExhausted) << status.message();
    return false;
  }

  Status Step(uint32_t most) {
    Status status = Player::Step(most);
    ExpectRight();
    return status;
  }

  // All steps, then Commit.
  void Finish(uint32_t chunk = 24) {
    while (!finished()) {
      Status status = Step(chunk);
      if (status.code() == Code::kExhausted) {  // slots may be held by saves under way
        store()->Flush();
        status = Step(chunk);
      }
      ASSERT_TRUE(status.ok()) << status.message();
      store()->Poll();
    }
    Commit();
  }

  void CheckLayer(uint32_t layer, uint32_t context) {
    Player::CheckLayer(layer, context);
    ExpectRight();
  }

 private:
  void ExpectRight() const { EXPECT_EQ(wrong(), "") << "wrong"; }
};

// A whole turn; returns what was cached at its beginning.
inline CachedTokens PlayTurn(AttentionStore* store, const Tokens& tokens,
                             const Truncation& truncation = {}) {
  Turn turn(store, tokens, truncation);
  for (int tries = 0; !turn.Begin(); ++tries) {
    if (tries == 10000) {
      ADD_FAILURE() << "no room";
      return {};
    }
    store->Flush();
    store->Poll();
  }
  const CachedTokens cached = turn.cached();
  turn.Finish();
  store->CheckInvariants();
  return cached;
}

inline uint32_t From(const CachedTokens& cached, Tier tier) {
  return cached.by_tier[static_cast<int>(tier)];
}

}  // namespace cachedattn
