// shared_lora: y[t] += scale * sum over m of shares[t, m] dW(tasks[t, m]) x[t], in two launches.
//
// The first makes z = x V over slabs of d, and the products of x with private right ends. The second adds the slabs in
// their order, lets each row meet the columns of its own task, and adds g U^T and the private left ends to y.
//
// With T rows, n = d, k_in = k_out = k, r columns to a task and b bytes to an entry it moves b (3 T d + 2 k d) bytes
// and the loadings of the tasks that occur, 2 b k r each, and does 2 T k (d + r) products. 64 rows of 64 tasks, d =
// 4096, k = 64, r = 16, half precision: 1.6 + 1.0 + 0.3 MB, 0.9 us at 3.35e12 bytes a second, and 34e6 products, no
// more than that even in float32. So the floor is two launches and two trips to memory, 6 us or so, as it is for one
// dense product of rank k: 0.7 of it is to be expected there. Of thousands of rows, where every block of the second
// launch makes the g of its rows anew for each 256 outputs, 0.3.
#include "tiles.cuh"

namespace loraspan {

// What `index` holds of a task: its first row in each of the five tables, its columns of each form, whether it is
// dense.
enum TaskField : int { kWeights, kLeft, kLeftPrivate, kRight, kRightPrivate, kSs, kSp, kPs, kPp, kDense, kTaskFields };

// One call; all fields are 8 bytes. Rows of `right` and so on are as in python/loraspan/ops/cores.py.
struct SharedLora {
  Matrix y, x, v, u;  // x is read by rows, v by columns, u by rows
  std::int64_t rows, outputs, inputs, rank_out, rank_in;
  const std::int64_t* index;  // [known, kTaskFields]
  std::int64_t known;
  const float* weights;
  const void *left, *left_private, *right, *right_private;
  std::int64_t dtype;         // of the four
  std::int64_t most[4];       // columns of each form, at most
  const std::int64_t* tasks;  // [rows, mixture]
  std::int64_t mixture;
  const float* shares;  // [rows, mixture], or null for ones
  double scale;
  float* z;        // [slabs, rows, rank_in], between the launches
  float* meeting;  // [rows, mixture, most[kSp] + most[kPp]]: x times private right ends
  std::int64_t slab, slabs;
  std::int64_t height;  // rows to a block of the second launch
};

constexpr int kOutputs = kThreads;

__host__ __device__ inline std::int64_t private_right(const SharedLora& call) { return call.most[1] + call.most[3]; }

__device__ __forceinline__ std::int64_t columns_at_most(const SharedLora& call) {
  return call.most[0] + call.most[1] + call.most[2] + call.most[3];
}

// What `index` says of a task; null for one that is none, or that the tables have no room for.
__device__ __forceinline__ const std::int64_t* task_of(const SharedLora& call, std::int64_t task) {
  if (task < 0 || task >= call.known) return nullptr;
  const std::int64_t* found = call.index + task * kTaskFields;
  for (int form = 0; form < 4; ++form)
    if (found[kSs + form] > call.most[form]) return nullptr;
  return found[kDense] && found[kSs] != call.rank_in ? nullptr : found;
}

__device__ __forceinline__ void multiply_all(Plain<float>& sums, const Plain<float>::Left& x,
                                             const Plain<float>::Right& v) {
  sums.multiply(x, v);
}

template <bool kBrain>
__device__ __forceinline__ void multiply_all(Tensor<kBrain>& sums, const typename Tensor<kBrain>::Left& x,
                                             const typename Tensor<kBrain>::Right& v) {
  sums.multiply_by_eights(x, v, Tensor<kBrain>::kDepth);
}

// One tile of x V over one slab of d.
template <typename Policy>
__device__ __forceinline__ void shrink(const SharedLora& call, std::int64_t block) {
  const std::int64_t high = (call.rows + Policy::kRows - 1) / Policy::kRows;
  const std::int64_t wide = (call.rank_in + Policy::kCols - 1) / Policy::kCols;
  const std::int64_t slab = block / (high * wide);
  const std::int64_t top = block / wide % high * Policy::kRows, side = block % wide * Policy::kCols;
  const std::int64_t begin = slab * call.slab;
  const std::int64_t end = begin + call.slab < call.inputs ? begin + call.slab : call.inputs;

  const EvenRows x = lines_of(call.x, 0, false), v = lines_of(call.v, 0, true);
  Policy sums;
  step_through<Policy::kDepth>(
      shared<PairsOf<Policy>>(), begin, end,
      [&](auto& pair, std::int64_t k) {
        stage(pair.left, x, top, call.rows, k, end, Reading(call.x.reading));
        stage(pair.right, v, side, call.rank_in, k, end, Reading(call.v.reading));
      },
      [&](auto& pair, std::int64_t) { multiply_all(sums, pair.left, pair.right); });
  float* out = call.z + slab * call.rows * call.rank_in;
  sums.each([&](int r, int c, int, float sum) {
    if (top + r < call.rows && side + c < call.rank_in) out[(top + r) * call.rank_in + side + c] = sum;
  });
}

// The products of one row of x with the private right ends of its tasks, one to a warp at a time.
__device__ __forceinline__ void meet(const SharedLora& call, std::int64_t row) {
  const int lane = threadIdx.x % 32;
  const std::int64_t most = private_right(call);
  const Row x = lines_of(call.x, 0, false)(row);
  for (std::int64_t slot = threadIdx.x / 32; slot < call.mixture * most; slot += kThreads / 32) {
    const std::int64_t* task = task_of(call, call.tasks[row * call.mixture + slot / most]);
    const std::int64_t which = slot % most;
    if (!task || which >= task[kSp] + task[kPp]) continue;
    const std::int64_t start = (task[kRightPrivate] + which) * call.inputs;
    float sum = 0;
    if (call.x.reading == kEights && call.dtype != kDouble) {
      for (std::int64_t j = lane * 8; j < call.inputs; j += 256) {
        const Eight<float> a = get_eight<float>(x.data, j, Dtype(x.dtype));
        const Eight<float> b = get_eight<float>(call.right_private, start + j, Dtype(call.dtype));
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fused(a.entry[i], b.entry[i], sum);
      }
    } else {
      for (std::int64_t j = lane; j < call.inputs; j += 32)
        sum = fused(get<float>(x.data, j * x.stride, Dtype(x.dtype)),
                    get<float>(call.right_private, start + j, Dtype(call.dtype)), sum);
    }
    sum = sum_over_warp(sum);
    if (lane == 0) call.meeting[row * call.mixture * most + slot] = sum;
  }
}

// Grid: (tiles of z) x (slabs), then the rows if there are private right ends.
template <typename Policy>
__global__ __launch_bounds__(kThreads, 2) void shrink_kernel(const __grid_constant__ SharedLora call,
                                                             std::int64_t tiles) {
  if (blockIdx.x < tiles)
    shrink<Policy>(call, blockIdx.x);
  else
    meet(call, blockIdx.x - tiles);
}

// Where a block of the second launch keeps its rows: z, the load of each column of each task, g.
struct Places {
  float *z, *loads, *g;
};

__device__ __forceinline__ Places places_of(const SharedLora& call, int row) {
  const std::int64_t loads = call.mixture * columns_at_most(call);
  float* start = given() + row * (call.rank_in + loads + call.rank_out);
  return {start, start + call.rank_in, start + call.rank_in + loads};
}

// weight * share * scale * (right end . x) of column c of a task, by one lane.
__device__ __forceinline__ float load_of(const SharedLora& call, const std::int64_t* task, const float* meeting,
                                         const float* z, std::int64_t c, float factor) {
  const std::int64_t ss = task[kSs], sp = task[kSp], ps = task[kPs];
  const float weight = call.weights[task[kWeights] + c] * factor;
  if (c < ss && task[kDense]) return weight * z[c];
  if (c >= ss && c < ss + sp) return weight * meeting[c - ss];
  if (c >= ss + sp + ps) return weight * meeting[c - ss - ps];
  const std::int64_t row = task[kRight] + (c < ss ? c : c - ss - sp + (task[kDense] ? 0 : ss));
  float sum = 0;
#pragma unroll 8
  for (std::int64_t k = 0; k < call.rank_in; ++k)
    sum = fused(get<float>(call.right, row * call.rank_in + k, Dtype(call.dtype)), z[k], sum);
  return weight * sum;
}

// z, the loads and g of one row, by one warp.
__device__ __forceinline__ void prepare_row(const SharedLora& call, std::int64_t row, const Places& place) {
  const int lane = threadIdx.x % 32;
  for (std::int64_t k = lane; k < call.rank_in; k += 32) {
    float sum = 0;
    for (std::int64_t slab = 0; slab < call.slabs; ++slab) sum += call.z[(slab * call.rows + row) * call.rank_in + k];
    place.z[k] = sum;
  }
  __syncwarp();
  const std::int64_t most = columns_at_most(call);
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t at = row * call.mixture + m;
    const std::int64_t* task = task_of(call, call.tasks[at]);
    if (!task) continue;
    const float factor = static_cast<float>(call.scale) * (call.shares ? call.shares[at] : 1.0f);
    const float* meeting = call.meeting + at * private_right(call);
    const std::int64_t count = task[kSs] + task[kSp] + task[kPs] + task[kPp];
    for (std::int64_t c = lane; c < count; c += 32)
      place.loads[m * most + c] = load_of(call, task, meeting, place.z, c, factor);
  }
  __syncwarp();
  for (std::int64_t k = lane; k < call.rank_out; k += 32) {
    float sum = 0;
    for (std::int64_t m = 0; m < call.mixture; ++m) {
      const std::int64_t* task = task_of(call, call.tasks[row * call.mixture + m]);
      if (!task) continue;
      const std::int64_t first = task[kLeft] * call.rank_out + k;
#pragma unroll 8
      for (std::int64_t c = 0; c < task[kSs] + task[kSp]; ++c)
        sum =
            fused(place.loads[m * most + c], get<float>(call.left, first + c * call.rank_out, Dtype(call.dtype)), sum);
    }
    place.g[k] = sum;
  }
}

// What a row wants done: nothing, its sum, or NaN because a task is out of range.
enum Wish : int { kLeave, kAdd, kSpoil };

__device__ __forceinline__ Wish wish_of(const SharedLora& call, std::int64_t row) {
  Wish wish = kLeave;
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t task = call.tasks[row * call.mixture + m];
    if (task == -1) continue;
    if (!task_of(call, task)) return kSpoil;
    wish = kAdd;
  }
  return wish;
}

// Private left ends of the row's tasks at one output.
__device__ __forceinline__ float add_private(const SharedLora& call, std::int64_t row, std::int64_t output,
                                             const float* loads, float sum) {
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t* task = task_of(call, call.tasks[row * call.mixture + m]);
    if (!task) continue;
    const float* own = loads + m * columns_at_most(call) + task[kSs] + task[kSp];
#pragma unroll 4
    for (std::int64_t i = 0; i < task[kPs] + task[kPp]; ++i)
      sum = fused(own[i],
                  get<float>(call.left_private, (task[kLeftPrivate] + i) * call.outputs + output, Dtype(call.dtype)),
                  sum);
  }
  return sum;
}

// Grid: (kHeight or fewer rows) x (256 outputs). A warp prepares a row, then each thread has one output of all rows.
template <int kHeight>
__global__ __launch_bounds__(kThreads, 2) void expand_kernel(const __grid_constant__ SharedLora call) {
  const std::int64_t wide = (call.outputs + kOutputs - 1) / kOutputs;
  const std::int64_t top = blockIdx.x / wide * kHeight, output = blockIdx.x % wide * kOutputs + threadIdx.x;
  for (int r = threadIdx.x / 32; r < kHeight; r += kThreads / 32)
    if (top + r < call.rows) prepare_row(call, top + r, places_of(call, r));
  __syncthreads();
  if (output >= call.outputs) return;

  const Row u = lines_of(call.u, 0, false)(output);
  const int height = call.rows - top < kHeight ? static_cast<int>(call.rows - top) : kHeight;
  const float* g = places_of(call, 0).g;
  const std::int64_t apart = places_of(call, 1).g - g;
  float sum[kHeight] = {};
  std::int64_t k = 0;
  if (call.u.reading == kEights)
    for (; k < call.rank_out; k += 8) {
      const Eight<float> got = get_eight<float>(u.data, k, Dtype(u.dtype));
#pragma unroll
      for (int r = 0; r < kHeight; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (r < height) sum[r] = fused(g[r * apart + k + i], got.entry[i], sum[r]);
    }
  for (; k < call.rank_out; ++k) {
    const float got = get<float>(u.data, k * u.stride, Dtype(u.dtype));
#pragma unroll
    for (int r = 0; r < kHeight; ++r)
      if (r < height) sum[r] = fused(g[r * apart + k], got, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < kHeight; ++r) {
    const Wish wish = r < height ? wish_of(call, top + r) : kLeave;
    if (wish == kLeave) continue;
    const float added = add_private(call, top + r, output, places_of(call, r).loads, sum[r]);
    const std::int64_t at = (top + r) * call.y.stride + output * call.y.step;
    const float value = get<float>(call.y.data, at, Dtype(call.y.dtype)) + added;
    put(call.y.data, at, Dtype(call.y.dtype), wish == kAdd ? value : bits_to_float(0x7fc00000u));
  }
}

}  // namespace loraspan

// path: 0 and 1 where x and v are both float16 or bfloat16, else 2. `call` lies in CPU memory and is copied into the
// launches; `bytes` is the shared memory of a block of the second.
extern "C" int loraspan_cuda_shared_lora(std::int64_t path, const loraspan::SharedLora* call, std::int64_t tiles,
                                         std::int64_t blocks, std::int64_t bytes, void* stream) {
  using namespace loraspan;
  const auto first = path == 0   ? shrink_kernel<Tensor<false>>
                     : path == 1 ? shrink_kernel<Tensor<true>>
                                 : shrink_kernel<Plain<float>>;
  const std::int64_t rows = private_right(*call) ? call->rows : 0;
  const int error = launch(first, tiles + rows, kThreads, stream, *call, tiles);
  if (error) return error;
  const auto second = call->height == 16 ? expand_kernel<16> : call->height == 4 ? expand_kernel<4> : expand_kernel<1>;
  return launch_with(bytes, second, blocks, kThreads, stream, *call);
}
