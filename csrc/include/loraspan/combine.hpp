// combine: V = X^T W rounded to its stored dtype and, in the same pass, X V and V^T V of the rounded V in float64.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

struct CombineJob {
  Rows x;
  const double* w;  // [R, k] row-major
  std::int64_t k;
  void* v;  // [columns, k]: entry (j, c) at v + j * v_row_stride + c * v_col_stride, in v_dtype; overwritten
  std::int64_t v_row_stride;
  std::int64_t v_col_stride;
  Dtype v_dtype;
  double* xv;   // [R, k] row-major, overwritten; null where X V is not asked for
  double* vtv;  // [k, k] row-major, both triangles, overwritten
};

using CombineFn = void(const CombineJob* jobs, std::int64_t count, Precision precision, int threads);

}  // namespace loraspan
