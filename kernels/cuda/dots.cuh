// Inner products of long rows, C [M, N] = A B^T in float64: the Gram matrix, the products with a basis, the sketch.
//
// One block makes one tile of C over one slab of columns. A matrix of more than one slab leaves the sums of each in a
// workspace, and `add_slabs` adds them in order: no result depends on which block came first.
#pragma once

#include "tiles.cuh"

namespace loraspan {

// One product, made by the caller (python/loraspan/_cuda/dots.py); all fields are 8 bytes.
struct Dots {
  std::int64_t first_block;                       // of this product among all of the launch
  std::int64_t first_sum;                         // the same in the launch of add_slabs
  std::int64_t left, left_rows, left_reading;     // rows of A in the table
  std::int64_t right, right_rows, right_reading;  // rows of B in the table; of signs, only their number
  std::int64_t columns;
  std::int64_t slab;       // columns of a slab, a multiple of 128
  std::int64_t slabs;      // at least 1
  std::int64_t symmetric;  // A is B: one triangle is made, and written twice
  std::int64_t seed;       // of signs
  double* partial;         // [slabs, M, N]; with one slab, C itself
  double* out;             // C [M, N], row-major
};

// The right side of a product by the table of rows.
template <typename Policy>
struct RowsOnTheRight {
  struct Shared {};
  // rows to a tile of float32 that some products are spared a second one by
  static constexpr int kWidest = 80;

  __device__ RowsOnTheRight(const Dots&, const Row* rows, Shared&, std::int64_t) : table{rows} {}

  __device__ __forceinline__ void stage_at(typename Policy::Right& tile, const Dots& job, std::int64_t first,
                                           std::int64_t, std::int64_t column, std::int64_t end) const {
    const TableOfRows right{table + job.right};
    if constexpr (Policy::kAside)
      stage_aside(tile, right, first, job.right_rows, column, end);
    else
      stage(tile, right, first, job.right_rows, column, end, Reading(job.right_reading));
  }

  const Row* table;
};

template <typename Policy, template <typename> class RightSide>
struct DotsShared {
  PairsOf<Policy> pairs;
  typename RightSide<Policy>::Shared beside;
};

// Writes what lies below the diagonal of a symmetric C [rows, rows] above it, by way of shared memory: an entry of
// each of many rows at a time, as the threads hold them, would cost memory 32 bytes for 8.
template <typename Policy, typename Memory, int kTotals>
__device__ void mirror(Memory& memory, double* out, std::int64_t rows, int top, int side, Policy& sums,
                       const double (&total)[kTotals]) {
  constexpr int kAtOnce = 16, kStride = Policy::kRows + 2;
  struct Turned {
    double value[kAtOnce][kStride];
  };
  static_assert(sizeof(Turned) <= sizeof(Memory), "columns of a tile fit where its sides were");
  Turned& turned = reinterpret_cast<Turned&>(memory);
#pragma unroll 1
  for (int first = 0; first < Policy::kCols; first += kAtOnce) {
    __syncthreads();
    sums.each([&](int r, int c, int i, auto sum) {
      if (c >= first && c < first + kAtOnce)
        turned.value[c - first][r] = Policy::kFlush ? total[i] : static_cast<double>(sum);
    });
    __syncthreads();
    for (int i = threadIdx.x; i < kAtOnce * Policy::kRows; i += kThreads) {
      const int c = i / Policy::kRows, r = i % Policy::kRows;
      const std::int64_t row = std::int64_t{top} + r, col = std::int64_t{side} + first + c;
      if (row < rows && col < row) out[col * rows + row] = turned.value[c][r];
    }
  }
}

// Grid: (tiles of C) x (slabs) of every job, slabs outermost: blocks that run together read the same columns.
template <typename Policy, template <typename> class RightSide>
__global__ __launch_bounds__(kThreads, 2) void dots_kernel(const Dots* jobs, std::int64_t count, const Row* rows) {
  const Dots& job = job_of(jobs, count, &Dots::first_block, blockIdx.x);
  // 32 bits, for these live as long as the sums, which take nearly all registers
  const int high = static_cast<int>((job.left_rows + Policy::kRows - 1) / Policy::kRows);
  const int wide = static_cast<int>((job.right_rows + Policy::kCols - 1) / Policy::kCols);
  const int block = static_cast<int>(blockIdx.x - job.first_block), slab = block / wide / high;
  const int top = block / wide % high * Policy::kRows, side = block % wide * Policy::kCols;
  // above the diagonal: the tile below it writes this one
  if (job.symmetric && side >= top + Policy::kRows) return;

  auto& memory = shared<DotsShared<Policy, RightSide>>();
  const RightSide<Policy> right(job, rows, memory.beside, side);
  const TableOfRows left{rows + job.left};
  const std::int64_t begin = slab * job.slab;
  const std::int64_t end = begin + job.slab < job.columns ? begin + job.slab : job.columns;

  Policy sums;
  int summed = 0;
  double total[Policy::kFlush ? Policy::kSums : 1] = {};
  step_through<Policy::kDepth>(
      memory.pairs, begin, end,
      [&](auto& pair, std::int64_t column) {
        if constexpr (Policy::kAside)
          stage_aside(pair.left, left, top, job.left_rows, column, end);
        else
          stage(pair.left, left, top, job.left_rows, column, end, Reading(job.left_reading));
        right.stage_at(pair.right, job, side, begin, column, end);
      },
      [&](auto& pair, std::int64_t column) {
        sums.multiply(pair.left, pair.right);
        if constexpr (Policy::kFlush != 0) {
          summed += Policy::kDepth;
          if (summed == Policy::kFlush || column + Policy::kDepth >= end) {
            sums.each([&](int, int, int i, float& sum) {
              total[i] += sum;
              sum = 0;
            });
            summed = 0;
          }
        }
      });

  double* out = job.partial + std::int64_t{slab} * job.left_rows * job.right_rows;
  sums.each([&](int r, int c, int i, auto sum) {
    const std::int64_t row = std::int64_t{top} + r, col = std::int64_t{side} + c;
    if (row >= job.left_rows || col >= job.right_rows || (job.symmetric && col > row)) return;
    out[row * job.right_rows + col] = Policy::kFlush ? total[i] : static_cast<double>(sum);
  });
  if (job.symmetric) mirror(memory.pairs, out, job.left_rows, top, side, sums, total);
}

// Adds the slabs of every entry in their order. Moves 8 (slabs + 1) M N bytes; with M = N = 1600 and 8 slabs, 184 MB,
// beside which a Gram matrix of d = 65536 reads 210 MB of X many times over from cache.
static __global__ void add_slabs(const Dots* jobs, std::int64_t count) {
  const Dots& job = job_of(jobs, count, &Dots::first_sum, blockIdx.x);
  const std::int64_t size = job.left_rows * job.right_rows;
  const std::int64_t i = (blockIdx.x - job.first_sum) * kThreads + threadIdx.x;
  if (i >= size) return;
  double total = job.partial[i];
  // loads of several slabs on their way at once; they are added in their order all the same
#pragma unroll 8
  for (std::int64_t slab = 1; slab < job.slabs; ++slab) total += job.partial[slab * size + i];
  job.out[i] = total;
}

// Tensor cores for more than 64 rows, all read by 16 bytes. 96 columns end within 120 units of roundoff, of 128 that
// are allowed; fewer flushes are worth much, since to make a float64 of a float32 takes as long as many products.
template <bool kBrain, int kDepth>
using Tall = Tensor<kBrain, 2, kDepth, 96>;

// Launches the products of one kind (the codes of python/loraspan/_cuda/dots.py) and the sums of their slabs.
template <template <typename> class RightSide, int kDepth>
int launch_dots(std::int64_t path, const Dots* jobs, std::int64_t count, std::int64_t blocks, std::int64_t sums,
                const Row* rows, void* stream) {
  const auto kernel = path == 0   ? dots_kernel<Tensor<false>, RightSide>
                      : path == 1 ? dots_kernel<Tensor<true>, RightSide>
                      : path == 2 ? dots_kernel<Plain<float>, RightSide>
                      : path == 3 ? dots_kernel<Plain<double>, RightSide>
                      : path == 4 ? dots_kernel<Tall<false, kDepth>, RightSide>
                      : path == 5 ? dots_kernel<Tall<true, kDepth>, RightSide>
                                  : dots_kernel<Plain<float, RightSide<Plain<float>>::kWidest>, RightSide>;
  const int error = launch(kernel, blocks, kThreads, stream, jobs, count, rows);
  return error ? error : launch(add_slabs, sums, kThreads, stream, jobs, count);
}

}  // namespace loraspan
