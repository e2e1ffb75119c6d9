// The register-tiled product that both Q K^T and P V are made of. Included after a Simd.
#pragma once

// Operands as float32, one element a word. simd_pairs.h has two bfloat16 a word.
struct FloatOperands {
  static constexpr int kPerWord = 1;
  static Simd::F Fma(Simd::F a, Simd::F b, Simd::F c) { return Simd::Fma(a, b, c); }
  // Packs a row of n floats in place.
  static void PackRow(float*, int) {}
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

// Rows of B one after the other: element (k, column).
struct DenseRows {
  const float* data;
  int64_t stride;
  const float* operator()(int k, int column) const { return data + k * stride + column; }
};

// Rows of B anywhere, still in the cache's element type.
template <typename T>
struct CacheRows {
  const T* const* rows;
  int64_t offset;
  const T* operator()(int k, int column) const { return rows[k] + offset + column; }
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
    for (int n = 0; n < N; ++n) x[n] = Simd::Load(b(k, column + n * Simd::kLanes));
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

// All `columns` columns (a multiple of 16) of M rows.
template <typename Op, int M, typename Rows>
inline void Gemm(int depth, const float* a, int64_t a_stride, const Rows& b, int columns, float* c,
                 int64_t c_stride, const float* keep) {
  constexpr int kStep = Simd::kColumns * Simd::kLanes;
  int column = 0;
  for (; column + kStep <= columns; column += kStep) {
    GemmTile<Op, M, Simd::kColumns>(depth, a, a_stride, b, column, c, c_stride, keep);
  }
  for (; column < columns; column += 16) {
    GemmTile<Op, M, 16 / Simd::kLanes>(depth, a, a_stride, b, column, c, c_stride, keep);
  }
}
