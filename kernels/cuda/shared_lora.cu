// shared_lora: y[t] += scale * sum over m of shares[t, m] dW(tasks[t, m]) x[t], in two launches.
//
// The first makes z = x V over slabs of d, a warp 16 rows of 32 columns at a time, and the products of x with private
// right ends. The second adds the slabs in their order, lets each row meet the columns of its own task, and adds g U^T
// and the private left ends to y. It asks for U, y and the columns before it waits for the first to end. A row's sums
// are the same whatever the other rows are.
//
// With T rows, n = d, k_in = k_out = k, r columns to a task and b bytes to an entry it moves b (3 T d + 2 k d) bytes
// and the loadings of the tasks that occur, 2 b k r each, and does 2 T k (d + r) products. 64 rows of 64 tasks, d =
// 4096, k = 64, r = 16, half precision: 1.6 + 1.0 + 0.3 MB, 0.9 us at 3.35e12 bytes a second, and 34e6 products, no
// more than that even in float32. So the floor is two launches and two trips to memory, 6 us or so, as it is for one
// dense product of rank k. Beside that each block of the second launch reads the slabs and columns of its 16 rows,
// 130 KB of them here, from the L2 cache: 16 MB for 128 blocks, 3 us.
//
// On an H100 it takes 16 us in a CUDA graph, 27 us in float32 and 59 us for 1024 rows, where the plain product of rank
// k takes 14, 18 and 24 us. Of the 16 the first launch has 3.5. The second is 188 KB of instructions, hardly any of
// which run twice: to fetch them is the likeliest of what it waits for.
#include "shared_lora_rows.cuh"
#include "shared_lora_shrink.cuh"

namespace loraspan {

// Four outputs of a row of y from `output` on, as they lie in memory if that is at once, else as float32.
struct Outputs {
  std::uint32_t word[4];
};

__device__ __forceinline__ bool in_halves(const SharedLora& call) {
  return call.y.reading == kEights && call.y.dtype != kFloat;
}

__device__ __forceinline__ Outputs outputs_of(const SharedLora& call, std::int64_t row, std::int64_t output) {
  Outputs found{};
  if (row < 0 || output >= call.outputs) return found;
  const std::int64_t at = row * call.y.stride + output * call.y.step;
  struct alignas(8) Two {
    std::uint32_t word[2];
  };
  if (in_halves(call)) {
    const Two two = *in_global(reinterpret_cast<const Two*>(static_cast<const std::uint16_t*>(call.y.data) + at));
    found.word[0] = two.word[0];
    found.word[1] = two.word[1];
  } else if (call.y.reading == kEights) {
    const Quad four = *in_global(reinterpret_cast<const Quad*>(static_cast<const float*>(call.y.data) + at));
#pragma unroll
    for (int i = 0; i < 4; ++i) found.word[i] = four.word[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (output + i < call.outputs)
        found.word[i] = float_to_bits(get<float>(call.y.data, at + i * call.y.step, Dtype(call.y.dtype)));
  }
  return found;
}

// Adds to four outputs of a row what is to be added, and puts them back.
__device__ __forceinline__ void add_to(const SharedLora& call, std::int64_t row, std::int64_t output, Outputs found,
                                       const float (&added)[4], Wish wish) {
  const bool halves = in_halves(call), brain = call.y.dtype == kBrain;
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t bits = found.word[i / 2] >> (i % 2 * 16) & 0xffffu;
    value[i] = !halves ? bits_to_float(found.word[i])
               : brain ? brain_to_float(bits)
                       : half_to_float(static_cast<std::uint16_t>(bits));
    value[i] = wish == kSpoil ? bits_to_float(0x7fc00000u) : value[i] + added[i];
  }
  const std::int64_t at = row * call.y.stride + output * call.y.step;
  if (call.y.reading != kEights) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (output + i < call.outputs) put(call.y.data, at + i * call.y.step, Dtype(call.y.dtype), value[i]);
    return;
  }
  if (!halves) {
    Quad four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.word[i] = float_to_bits(value[i]);
    *reinterpret_cast<Quad*>(static_cast<float*>(call.y.data) + at) = four;
    return;
  }
  struct alignas(8) Two {
    std::uint32_t word[2];
  } two;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float low = value[2 * i], high = value[2 * i + 1];
    two.word[i] = brain ? float_to_bfloat(low) | static_cast<std::uint32_t>(float_to_bfloat(high)) << 16
                        : float_to_half(low) | static_cast<std::uint32_t>(float_to_half(high)) << 16;
  }
  *reinterpret_cast<Two*>(static_cast<std::uint16_t*>(call.y.data) + at) = two;
}

// Asks for the shared ends of the tasks of a row, by 16 lanes.
__device__ __forceinline__ void expect_columns(const SharedLora& call, std::int64_t row) {
  const std::int64_t size = call.dtype == kFloat ? 4 : 2, lane = threadIdx.x % 16;
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t* task = task_of(call, call.tasks[row * call.mixture + m]);
    if (!task) continue;
    const std::int64_t rights = (task[kDense] ? 0 : task[kSs]) + task[kPs], lefts = task[kSs] + task[kSp];
    const char* right = static_cast<const char*>(call.right) + task[kRight] * call.rank_in * size;
    const char* left = static_cast<const char*>(call.left) + task[kLeft] * call.rank_out * size;
    for (std::int64_t at = 128 * lane; at < rights * call.rank_in * size; at += 128 * 16) expect(right + at);
    for (std::int64_t at = 128 * lane; at < lefts * call.rank_out * size; at += 128 * 16) expect(left + at);
  }
}

// Outputs of a turn: 16 to a warp.
constexpr int kOutputs = 16 * kWarps;

// What a lane holds of U for one turn.
template <typename Policy>
struct Held {
  // columns of U to a turn: 128 bytes of them
  static constexpr int kDeep = 128 / static_cast<int>(sizeof(typename Policy::Entry));
  Eight<typename Policy::Entry> u[kDeep / 32][2];
};

template <typename Policy>
__device__ __forceinline__ Held<Policy> hold(const SharedLora& call, std::int64_t first, std::int64_t k) {
  using Entry = typename Policy::Entry;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const bool eights = call.u.reading == kEights;
  Held<Policy> held{};
#pragma unroll
  for (int c = 0; c < Held<Policy>::kDeep / 32; ++c)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // so that a lane ends up with four outputs in a row
      const std::int64_t output = first + 16 * warp + 4 * (g / 2) + 2 * j + g % 2, from = k + 32 * c + 8 * t;
      if (output >= call.outputs || from >= call.rank_out) continue;
      const std::int64_t at = output * call.u.stride + from * call.u.step;
      if (eights) {
        held.u[c][j] = get_eight<Entry>(call.u.data, at, Dtype(call.u.dtype));
        continue;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (from + i < call.rank_out)
          held.u[c][j].entry[i] = get<Entry>(call.u.data, at + i * call.u.step, Dtype(call.u.dtype));
    }
  return held;
}

// The row of a lane's outputs, -1 for none: g or g + 8 of those of the block.
__device__ __forceinline__ std::int64_t row_of(const SharedLora& call, std::int64_t top, int r) {
  return r < call.height && top + r < call.rows ? top + r : -1;
}

// Asks for the outputs that a warp is to add to.
__device__ __forceinline__ void expect_outputs(const SharedLora& call, std::int64_t top, std::int64_t first) {
  const std::int64_t output = first + 16 * (threadIdx.x / 32), row = row_of(call, top, threadIdx.x % 32 / 2);
  const std::int64_t size = call.y.dtype == kFloat ? 4 : 2, at = row * call.y.stride + output * call.y.step;
  if (threadIdx.x % 2 == 0 && row >= 0 && output < call.outputs) expect(static_cast<char*>(call.y.data) + at * size);
}

// Grid: (call.height rows) x (call.wide outputs). Each warp prepares two rows; then it takes its outputs of all of
// them.
template <typename Policy>
__global__ __launch_bounds__(kThreads, 2) void expand_kernel(const __grid_constant__ SharedLora call) {
  constexpr bool kExact = sizeof(typename Policy::Entry) == 2;
  constexpr int kDeep = Held<Policy>::kDeep;
  const std::int64_t across = (call.outputs + call.wide - 1) / call.wide;
  const std::int64_t top = blockIdx.x / across * call.height, begin = blockIdx.x % across * call.wide;
  const std::int64_t end = begin + call.wide < call.outputs ? begin + call.wide : call.outputs;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int* wishes = reinterpret_cast<int*>(places_of(call, static_cast<int>(call.height)).z);

  Held<Policy> next = hold<Policy>(call, begin, 0);
  expect_outputs(call, top, begin);
  const int mine = warp + kWarps * (threadIdx.x % 32 / 16);
  const std::int64_t row = row_of(call, top, mine);
  if (row >= 0) {
    expect_columns(call, row);
    if (threadIdx.x % 16 == 0) wishes[mine] = wish_of(call, row);
  }
  wait_for_last();
  const Places place = places_of(call, row < 0 ? 0 : mine);
  if (call.dtype == kFloat)
    prepare<float>(call, row, place);
  else
    prepare<std::uint16_t>(call, row, place);
  __syncthreads();

  float sum[2][4] = {};
  std::int64_t k = 0;
  for (std::int64_t first = begin; first < end;) {
    const Held<Policy> held = next;
    const bool last = k + kDeep >= call.rank_out;
    const std::int64_t now = first, from = k;
    first = last ? first + kOutputs : first;
    k = last ? 0 : k + kDeep;
    if (first < end) {
      next = hold<Policy>(call, first, k);
      if (last) expect_outputs(call, top, first);
    }
    Outputs y[2] = {};
    if (last)
#pragma unroll
      for (int i = 0; i < 2; ++i) y[i] = outputs_of(call, row_of(call, top, g + 8 * i), now + 16 * warp + 4 * t);
#pragma unroll
    for (int c = 0; c < kDeep / 32; ++c) {
      if (from + 32 * c >= call.rank_out) break;
      Eight<float> left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = g + 8 * i < call.height ? g + 8 * i : 0;
        const Four* here = reinterpret_cast<const Four*>(places_of(call, r).g + from + 32 * c + 8 * t);
#pragma unroll
        for (int e = 0; e < 8; ++e) left[i].entry[e] = here[e / 4].value[e % 4];
      }
      Floats<kExact ? 1 : 3>::multiply(sum, left, held.u[c], [](auto entry) { return Policy::value(entry); });
    }
    if (!last) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = g + 8 * i;
      const std::int64_t output = now + 16 * warp + 4 * t;
      if (row_of(call, top, r) < 0 || output >= call.outputs || wishes[r] == kLeave) continue;
      float added[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        added[q] = sum[q / 2][2 * i + q % 2];
        if (wishes[r] == kAddOwn && output + q < call.outputs)
          added[q] = add_private(call, top + r, output + q, places_of(call, r).loads, added[q]);
      }
      add_to(call, top + r, output, y[i], added, Wish(wishes[r]));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = 0;
  }
}

}  // namespace loraspan

// path: 0 and 1 where x and v are both float16 or bfloat16, else 2. `call` lies in CPU memory and is copied into the
// launches; `bytes` is the shared memory of a block of the second.
extern "C" int loraspan_cuda_shared_lora(std::int64_t path, const loraspan::SharedLora* call, std::int64_t tiles,
                                         std::int64_t blocks, std::int64_t bytes, void* stream) {
  using namespace loraspan;
  const bool many = call->rows > kMany;
  const auto first = path == 0   ? many ? shrink_kernel<Halves<false>, 4, 2> : shrink_kernel<Halves<false>, 4, 1>
                     : path == 1 ? many ? shrink_kernel<Halves<true>, 4, 2> : shrink_kernel<Halves<true>, 4, 1>
                                 : shrink_kernel<Floats<3>, 4, 1>;
  const std::int64_t rows = private_right(*call) ? call->rows : 0;
  const int error = launch(first, tiles + rows, kThreads, stream, *call, tiles);
  if (error) return error;
  const auto second = call->u.dtype == kHalf    ? expand_kernel<Halves<false>>
                      : call->u.dtype == kBrain ? expand_kernel<Halves<true>>
                                                : expand_kernel<Floats<3>>;
  const auto start = tiles + rows ? launch_after<SharedLora> : launch_with<SharedLora>;
  return start(bytes, second, blocks, kThreads, stream, *call);
}
