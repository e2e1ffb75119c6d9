#include <gtest/gtest.h>
TEST(HazardTest, Empty) {}
