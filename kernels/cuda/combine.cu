// combine: V = X^T W, rounded once to what is stored. The products X V and V^T V are those of gram.cu, of the V in
// memory.
//
// With R rows, d columns of b bytes, k vectors of v bytes and a card that reads B bytes and does F float32 products a
// second: b R d + v k d bytes and R d k products, and as many again in X V, so the floor is
//     max((2 b R d + 2 v k d) / B, 2 R d k / F),
// where X is read twice unless it stays in cache. R = 1600, d = 4096, k = 64, half precision, B = 3.35e12, F = 3.3e13
// (H100): 26 MB in 8 us, 8.4e8 products in 25 us. W is float32 by contract, so tensor cores do not take part. On an
// H100 one such matrix and its products reach 0.14 of the floor, 24 of them 0.4, and one of 128 x 65536 0.25.
#include "rows.cuh"

namespace loraspan {

// One V; all fields are 8 bytes.
struct Combine {
  std::int64_t first_block;
  std::int64_t first_row, rows, reading;  // X in the table
  std::int64_t columns;                   // d
  std::int64_t rank;                      // k
  const void* weights;                    // W [R, k], row-major, in the dtype of the sums
  std::int64_t weights_reading;
  void* out;                         // V [d, k], of any strides, counted in entries
  std::int64_t stride, step, dtype;  // between rows of V, between its columns
};

// Rows of X and W to a step.
constexpr int kRowsAtOnce = 16;

// Grid: (tiles of 16 kHeight columns of X x 16 kWidth of W) of every job, those of the same columns of X beside each
// other. Thread (y, x) sums kHeight neighbouring columns of X with columns x + 16 j of W, over the rows in their order:
// how large tiles are changes no bit.
template <typename T, int kHeight, int kWidth>
__global__ __launch_bounds__(kThreads, 2) void combine_kernel(const Combine* jobs, std::int64_t count,
                                                              const Row* rows) {
  constexpr int kHigh = 16 * kHeight, kWide = 16 * kWidth;
  const Combine& job = job_of(jobs, count, &Combine::first_block, blockIdx.x);
  const std::int64_t wide = (job.rank + kWide - 1) / kWide, block = blockIdx.x - job.first_block;
  const std::int64_t top = block / wide * kHigh, side = block % wide * kWide;
  const int y = threadIdx.x / 16 * kHeight, x = threadIdx.x % 16;

  auto& pairs = shared<Pairs<Tile<T, kRowsAtOnce, kHigh>, Tile<T, kRowsAtOnce, kWide>>>();
  const EvenRows weights{job.weights, job.rank * std::int64_t{sizeof(T)}, 1, sizeof(T) == 4 ? kFloat : kDouble};
  T sum[kHeight][kWidth] = {};
  step_through<kRowsAtOnce>(
      pairs, 0, job.rows,
      [&](auto& pair, std::int64_t row) {
        stage(pair.left, TableOfRows{rows + job.first_row}, row, job.rows, top, job.columns, Reading(job.reading));
        stage(pair.right, weights, row, job.rows, side, job.rank, Reading(job.weights_reading));
      },
      [&](auto& pair, std::int64_t) {
#pragma unroll 4
        for (int r = 0; r < kRowsAtOnce; ++r) {
          T left[kHeight], right[kWidth];
#pragma unroll
          for (int i = 0; i < kHeight; ++i) left[i] = pair.left.entry[r][y + i];
#pragma unroll
          for (int j = 0; j < kWidth; ++j) right[j] = pair.right.entry[r][x + 16 * j];
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
      if (top + y + i < job.columns && side + x + 16 * j < job.rank)
        put(job.out, (top + y + i) * job.stride + (side + x + 16 * j) * job.step, Dtype(job.dtype), sum[i][j]);
}

using CombineKernel = void (*)(const Combine*, std::int64_t, const Row*);

// By the tile; nullptr for one that is not built.
template <typename T, int kHeight>
CombineKernel combine_of(std::int64_t width) {
  if constexpr (sizeof(T) == 8)
    return width == 2 ? combine_kernel<T, kHeight, 2> : width == 4 ? combine_kernel<T, kHeight, 4> : nullptr;
  else
    return width == 2   ? combine_kernel<T, kHeight, 2>
           : width == 3 ? combine_kernel<T, kHeight, 3>
           : width == 4 ? combine_kernel<T, kHeight, 4>
           : width == 5 ? combine_kernel<T, kHeight, 5>
           : width == 6 ? combine_kernel<T, kHeight, 6>
                        : nullptr;
}

}  // namespace loraspan

// Tiles are 16 height x 16 width: 8 or 4 by 2 to 6, of float64 4 by 2 or 4.
extern "C" int loraspan_cuda_combine(std::int64_t wide, std::int64_t height, std::int64_t width,
                                     const loraspan::Combine* jobs, std::int64_t count, std::int64_t blocks,
                                     const loraspan::Row* rows, void* stream) {
  const auto kernel = wide          ? loraspan::combine_of<double, 4>(width)
                      : height == 8 ? loraspan::combine_of<float, 8>(width)
                                    : loraspan::combine_of<float, 4>(width);
  return loraspan::launch(kernel, blocks, loraspan::kThreads, stream, jobs, count, rows);
}
