// The register-tiled product that both Q K^T and P V are made of. Included after a Simd.
#pragma once

// Operands as float32, one element a word. simd_pairs.h has two bfloat16 a word.
struct FloatOperands {
  static constexpr int kPerWord = 1;
  static Simd::F Fma(Simd::F a, Simd::F b, Simd::F c) { return Simd::Fma(a, b, c); }
  // Packs a row of n floats in place.
  static void PackRow(float*, int) {}
  // Packs rows [0, n) of kKeyTile floats to rows [0, n / kPerWord), in place.
  static void PackColumns(float*, int) {}
  // Widens V rows [0, n) to v [n / kPerWord, dim] words.
  template <typename T>
  static void PackValues(const T* const* rows, int64_t offset, int n, int dim, float* v) {
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < dim; i += Simd::kLanes) {
        Simd::Store(Simd::Load(rows[j] + offset + i), v + j * dim + i);
      }
    }
  }
};

// How extend multiplies K and V of element type T.
template <typename T>
struct OperandsOf {
  using Type = FloatOperands;
};

// Rows of B one after the other.
struct DenseRows {
  const float* data;
  int64_t stride;
  // N vectors of row k from `column` on.
  template <int N>
  void Load(int k, int column, Simd::F* x) const {
    for (int n = 0; n < N; ++n) x[n] = Simd::Load(data + k * stride + column + n * Simd::kLanes);
  }
};

// M rows x N vectors: c = c * keep + a b, with a [M, depth] words, `keep` one factor a row;
// nullptr: 0.
template <typename Op, int M, int N, typename Rows>
inline void GemmTile(int depth, const float* a, int64_t a_stride, const Rows& b, int column,
                     float* c, int64_t c_stride, const float* keep) {
  Simd::F sum[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sum[m][n] = Simd::Zero();
  }
  for (int k = 0; k < depth; ++k) {
    Simd::F x[N];
    b.template Load<N>(k, column, x);
    for (int m = 0; m < M; ++m) {
      const Simd::F factor = Simd::Set(a[m * a_stride + k]);
      for (int n = 0; n < N; ++n) sum[m][n] = Op::Fma(factor, x[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* place = c + m * c_stride + column + n * Simd::kLanes;
      if (keep != nullptr) {
        sum[m][n] = Simd::Fma(Simd::Load(place), Simd::Set(keep[m]), sum[m][n]);
      }
      Simd::Store(sum[m][n], place);
    }
  }
}

// All `columns` columns (a multiple of 16) of M rows, N vectors at a time.
template <typename Op, int M, int N = Simd::kColumns, typename Rows>
inline void Gemm(int depth, const float* a, int64_t a_stride, const Rows& b, int columns, float* c,
                 int64_t c_stride, const float* keep, int column = 0) {
  constexpr int kStep = N * Simd::kLanes;
  for (; column + kStep <= columns; column += kStep) {
    GemmTile<Op, M, N>(depth, a, a_stride, b, column, c, c_stride, keep);
  }
  if constexpr (kStep > 16) {
    Gemm<Op, M, N / 2>(depth, a, a_stride, b, columns, c, c_stride, keep, column);
  }
}
