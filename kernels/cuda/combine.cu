// combine: V = X^T W, rounded once to what is stored. The products X V and V^T V are those of gram.cu, of the V in
// memory.
//
// With R rows, d columns of b bytes, k vectors of v bytes and a card that reads B bytes and does F float32 products a
// second: b R d + v k d bytes and R d k products, and as many again in X V, so the floor is
//     max((2 b R d + 2 v k d) / B, 2 R d k / F),
// where X is read twice unless it stays in cache. R = 1600, d = 4096, k = 64, half precision, B = 3.35e12, F = 3.3e13
// (H100): 26 MB in 8 us, 8.4e8 products in 25 us. W is float32 by contract, so tensor cores do not take part. 0.6 of
// the floor is to be expected, from the share of a warp's instructions that multiply.
#include "rows.cuh"

namespace loraspan {

// One V; all fields are 8 bytes.
struct Combine {
  std::int64_t first_block;
  std::int64_t first_row, rows, reading;  // X in the table
  std::int64_t columns;                   // d
  std::int64_t rank;                      // k
  const double* weights;                  // W [R, k], row-major
  void* out;                              // V [d, k], of any strides, counted in entries
  std::int64_t stride, step, dtype;       // between rows of V, between its columns
};

// Columns of X and of W to a tile, and rows of both to a step.
template <typename T>
constexpr int kColumns = sizeof(T) == 4 ? 128 : 64;
constexpr int kRank = 64, kRowsAtOnce = 16;

// Grid: (tiles of V) of every job, those of the same columns beside each other. Thread (y, x) sums kHeight neighbouring
// columns of X with 4 neighbouring columns of W, over the rows in their order.
template <typename T>
__global__ __launch_bounds__(kThreads, 2) void combine_kernel(const Combine* jobs, std::int64_t count,
                                                              const Row* rows) {
  constexpr int kHeight = kColumns<T> / 16, kWidth = kRank / 16;
  const Combine& job = job_of(jobs, count, &Combine::first_block, blockIdx.x);
  const std::int64_t wide = (job.rank + kRank - 1) / kRank, block = blockIdx.x - job.first_block;
  const std::int64_t top = block / wide * kColumns<T>, side = block % wide * kRank;
  const int y = threadIdx.x / 16 * kHeight, x = threadIdx.x % 16 * kWidth;

  auto& pairs = shared<Pairs<Tile<T, kRowsAtOnce, kColumns<T>>, Tile<T, kRowsAtOnce, kRank>>>();
  const EvenRows weights{job.weights, job.rank * 8, 1, kDouble};
  T sum[kHeight][kWidth] = {};
  step_through<kRowsAtOnce>(
      pairs, 0, job.rows,
      [&](auto& pair, std::int64_t row) {
        stage(pair.left, TableOfRows{rows + job.first_row}, row, job.rows, top, job.columns, Reading(job.reading));
        stage(pair.right, weights, row, job.rows, side, job.rank, kAlongColumns);
      },
      [&](auto& pair, std::int64_t) {
#pragma unroll 4
        for (int r = 0; r < kRowsAtOnce; ++r) {
          T left[kHeight], right[kWidth];
#pragma unroll
          for (int i = 0; i < kHeight; ++i) left[i] = pair.left.entry[r][y + i];
#pragma unroll
          for (int j = 0; j < kWidth; ++j) right[j] = pair.right.entry[r][x + j];
#pragma unroll
          for (int i = 0; i < kHeight; ++i)
#pragma unroll
            for (int j = 0; j < kWidth; ++j) sum[i][j] = fused(left[i], right[j], sum[i][j]);
        }
      });

#pragma unroll
  for (int i = 0; i < kHeight; ++i)
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (top + y + i < job.columns && side + x + j < job.rank)
        put(job.out, (top + y + i) * job.stride + (side + x + j) * job.step, Dtype(job.dtype), sum[i][j]);
}

}  // namespace loraspan

extern "C" int loraspan_cuda_combine(std::int64_t wide, const loraspan::Combine* jobs, std::int64_t count,
                                     std::int64_t blocks, const loraspan::Row* rows, void* stream) {
  const auto kernel = wide ? loraspan::combine_kernel<double> : loraspan::combine_kernel<float>;
  return loraspan::launch(kernel, blocks, loraspan::kThreads, stream, jobs, count, rows);
}
