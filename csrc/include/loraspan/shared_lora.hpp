// shared_lora: y[t] += scale * sum over m of shares[t, m] dW(tasks[t, m]) x[t], for rows with different tasks of one
// slot, where dW = sum over columns c of weight_c left_c right_c^T and most ends are coefficients on the bases u and v.
#pragma once

#include "loraspan/reconstruct.hpp"

namespace loraspan {

// What `index` holds per task: its first row in each of the five tables, its columns of each form, whether it is dense.
enum TaskField : int { kWeights, kLeft, kLeftPrivate, kRight, kRightPrivate, kSs, kSp, kPs, kPp, kDense, kTaskFields };

// The columns of all tasks. Each end of a column is shared (a row of coefficients on a basis) or private (the vector
// itself); a task's columns come in the order ss, sp, ps, pp (left end first: s shared, p private). Of a dense task the
// right end of ss column c is column c of v, and it has no rows of `right` for those.
struct Cores {
  const std::int64_t* index;  // [tasks, kTaskFields]
  std::int64_t tasks;
  const void* weights;        // [.], float, or double if `dtype` is f64
  const void* left;           // [., k_out]
  const void* left_private;   // [., n]
  const void* right;          // [., k_in]
  const void* right_private;  // [., d]
  std::int64_t rows[5];       // of each of the five, in this order
  Dtype dtype;                // of the tables of ends that are not packed
  // Of left, left_private, right, right_private: bits of the codes there, 0 where a table is not packed; and scales.
  std::int64_t bits[4] = {};
  const std::uint16_t* scales[4] = {};
};

struct SharedLoraJob {
  Matrix y;  // [t, n], read and written
  Matrix x;  // [t, d]
  Matrix v;  // [d, k_in], may be packed
  Matrix u;  // [n, k_out], may be packed
  std::int64_t t, d, n, k_in, k_out;
  Cores cores;
  const std::int64_t* tasks;  // [t, mixture], contiguous; -1 for none
  std::int64_t mixture;
  const float* shares;  // [t, mixture], contiguous, or null for ones
  double scale;
  bool transposed;  // take dW^T: `u` and `v`, left and right change places in the columns' meaning (not in the fields)
};

// Sums are kept in float32, or in float64 if y, x, v, u or the ends are float64; y is rounded once. Rows whose tasks
// are all -1 are not written. A row's result has the same bits for any number of threads; whether a task's own factors
// are rebuilt for its rows is decided by how many rows it has. Returns -1, or the first row with a task that is out of
// range or whose columns do not lie in the tables; nothing is written then.
using SharedLoraFn = std::int64_t(const SharedLoraJob& job, int threads);

}  // namespace loraspan
