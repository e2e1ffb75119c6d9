// The wgmma instructions in PTX, one function per shape and element type (device_sm90.h says what
// they do). Included by device_sm90.h under nvcc only.
#pragma once

namespace cachedattn::cuda {

template <typename T, int N>
CA_DEVICE void WgmmaShared(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate);
template <typename T, int N, bool kTransposeB>
CA_DEVICE void WgmmaRegisters(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b,
                              bool accumulate);

// The 32 sums of N = 64: their names in the instruction, and the operands.
#define CA_SUMS_64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CA_OPERANDS_64                                                                            \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])

// The 64 sums of N = 128: their names in the instruction, and the operands.
#define CA_SUMS_128                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CA_OPERANDS_128                                                                           \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),  \
      "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),  \
      "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),  \
      "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),  \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

#define CA_WGMMA_64(T, TYPE)                                                         \
  template <>                                                                        \
  CA_DEVICE void WgmmaShared<T, 64>(float(&d)[32], uint64_t desc_a, uint64_t desc_b, \
                                    bool accumulate) {                               \
    asm volatile(                                                                    \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                 \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" CA_SUMS_64  \
        "}, "                                                                        \
        "%32, %33, p, 1, 1, 0, 0;\n}"                                                \
        : CA_OPERANDS_64                                                             \
        : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate)));              \
  }                                                                                  \
  template <>                                                                        \
  CA_DEVICE void WgmmaRegisters<T, 64, false>(float(&d)[32], const uint32_t(&a)[4],  \
                                              uint64_t desc_b, bool accumulate) {    \
    CA_WGMMA_RS_64(TYPE, "0");                                                       \
  }                                                                                  \
  template <>                                                                        \
  CA_DEVICE void WgmmaRegisters<T, 64, true>(float(&d)[32], const uint32_t(&a)[4],   \
                                             uint64_t desc_b, bool accumulate) {     \
    CA_WGMMA_RS_64(TYPE, "1");                                                       \
  }
#define CA_WGMMA_RS_64(TYPE, TRANSPOSE)                                           \
  asm volatile(                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" CA_SUMS_64 \
      "}, "                                                                       \
      "{%32, %33, %34, %35}, %36, p, 1, 1, " TRANSPOSE ";\n}"                     \
      : CA_OPERANDS_64                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b),                  \
        "r"(static_cast<int>(accumulate)))
CA_WGMMA_64(Bf16, "bf16")
CA_WGMMA_64(Fp16, "f16")

#define CA_WGMMA_128(T, TYPE)                                                         \
  template <>                                                                         \
  CA_DEVICE void WgmmaShared<T, 128>(float(&d)[64], uint64_t desc_a, uint64_t desc_b, \
                                     bool accumulate) {                               \
    asm volatile(                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                  \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" CA_SUMS_128 \
        "}, "                                                                         \
        "%64, %65, p, 1, 1, 0, 0;\n}"                                                 \
        : CA_OPERANDS_128                                                             \
        : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate)));               \
  }                                                                                   \
  template <>                                                                         \
  CA_DEVICE void WgmmaRegisters<T, 128, false>(float(&d)[64], const uint32_t(&a)[4],  \
                                               uint64_t desc_b, bool accumulate) {    \
    CA_WGMMA_RS_128(TYPE, "0");                                                       \
  }                                                                                   \
  template <>                                                                         \
  CA_DEVICE void WgmmaRegisters<T, 128, true>(float(&d)[64], const uint32_t(&a)[4],   \
                                              uint64_t desc_b, bool accumulate) {     \
    CA_WGMMA_RS_128(TYPE, "1");                                                       \
  }
#define CA_WGMMA_RS_128(TYPE, TRANSPOSE)                                            \
  asm volatile(                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" CA_SUMS_128 \
      "}, "                                                                         \
      "{%64, %65, %66, %67}, %68, p, 1, 1, " TRANSPOSE ";\n}"                       \
      : CA_OPERANDS_128                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b),                    \
        "r"(static_cast<int>(accumulate)))
CA_WGMMA_128(Bf16, "bf16")
CA_WGMMA_128(Fp16, "f16")

#undef CA_SUMS_64
#undef CA_SUMS_128
#undef CA_OPERANDS_64
#undef CA_OPERANDS_128
#undef CA_WGMMA_64
#undef CA_WGMMA_128
#undef CA_WGMMA_RS_64
#undef CA_WGMMA_RS_128

}  // namespace cachedattn::cuda
