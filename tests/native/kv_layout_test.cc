#include "csrc/base/kv_layout.h"

#include <gtest/gtest.h>

namespace cachedattn {
namespace {

TEST(KvLayout, SizesOfARealModel) {
  const KvLayout layout{30, 3, 64, 64, DType::kBFloat16};
  EXPECT_TRUE(layout.Validate().ok());
  EXPECT_EQ(layout.slice_bytes(), 2u * 3 * 64 * 64 * 2);
  EXPECT_EQ(layout.slice_stride(), layout.slice_bytes());  // a multiple of the page already
  EXPECT_EQ(layout.host_slot_bytes(), kPage + 30 * layout.slice_bytes());
  EXPECT_EQ(layout.host_slice_offset(2), kPage + 2 * layout.slice_bytes());
  EXPECT_EQ(layout.device_slice_offset(2), 2 * layout.slice_bytes());
  EXPECT_EQ(layout.num_blocks(64), 1u);
  EXPECT_EQ(layout.num_blocks(65), 2u);
}

TEST(KvLayout, SlicesArePaddedToPages) {
  const KvLayout layout{3, 1, 40, 16, DType::kFloat32};
  EXPECT_EQ(layout.slice_bytes(), 5120u);
  EXPECT_EQ(layout.slice_stride(), 8192u);
  EXPECT_EQ(layout.host_slot_bytes(), 4096u + 3 * 8192u);
}

TEST(KvLayout, NamesTheFieldThatIsOutOfRange) {
  const KvLayout good{2, 2, 64, 64, DType::kBFloat16};
  ASSERT_TRUE(good.Validate().ok());
  const auto expect = [](KvLayout layout, const char* text) {
    const Status status = layout.Validate();
    EXPECT_EQ(status.code(), Code::kInvalidArgument);
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  KvLayout bad = good;
  bad.num_layers = 0;
  expect(bad, "num_layers is 0");
  bad.num_layers = KvLayout::kMaxLayers + 1;
  expect(bad, "num_layers is 241");
  bad = good;
  bad.num_kv_heads = 0;
  expect(bad, "num_kv_heads is 0");
  bad = good;
  bad.head_dim = 1025;
  expect(bad, "head_dim is 1025");
  bad.head_dim = 63;
  expect(bad, "must be even");
  bad = good;
  bad.block_size = 0;
  expect(bad, "block_size is 0");
  bad = good;
  bad.dtype = static_cast<DType>(3);
  expect(bad, "dtype is 3");
  expect({240, 1024, 1024, 4096, DType::kFloat32}, "smaller block_size");
}

}  // namespace
}  // namespace cachedattn
