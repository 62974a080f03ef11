// short_svd: leading singular vectors of many matrices of few rows, all of one size, each through its Gram.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

// X_i [rows, columns] is `x` moved on by i * x_stride bytes, and V_i [columns, k] `v` by i * v_stride. With G = X X^T
// (sums in float32) = W diag(values) W^T, V = X^T W_k / sqrt(values_k). Everything but v is contiguous, member by
// member.
struct ShortSvdJob {
  Block x;
  std::int64_t columns, count, x_stride;
  std::int64_t k;  // of at most `rows`
  void* v;
  std::int64_t v_stride, v_row_stride, v_col_stride;
  Dtype v_dtype;
  double* values;  // [rows], descending, as they come: rounding may leave some below zero
  double* totals;  // [1]: the trace of G
  double* w;       // [rows, k]; the first entry of largest magnitude of a column is positive
  double* vtv;     // [k, k]: of V as rounded, sums in float32
};

// A result has the bits that gram, eigh and combine give one after the other, for any number of threads and members.
using ShortSvdFn = void(const ShortSvdJob& job, int threads);

}  // namespace loraspan
