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
// On an H100 it takes 14 us in a CUDA graph, 21 us in float32 and 43 us for 1024 rows, where the plain product of rank
// k takes 15, 23 and 24 us. Of the 14 the first launch has 3.5. From 257 rows on both launches have kernels of their
// own, which wait for their tensor cores, with two to four warps to a scheduler, rather than for memory.
#include "shared_lora_expand.cuh"
#include "shared_lora_shrink.cuh"

namespace loraspan {

// Four outputs of a row of y from `output` on, as they lie in memory if that is at once, else as float32. The first is
// entry `at`.
struct Outputs {
  std::uint32_t word[4];
};

template <typename Known>
__device__ __forceinline__ bool in_halves(const SharedLora& call) {
  return Known::eights(call.y.reading) && Known::dtype(call.y.dtype) != kFloat;
}

template <typename Known>
__device__ __forceinline__ Outputs outputs_of(const SharedLora& call, std::int64_t at, std::int64_t output) {
  Outputs found{};
  struct alignas(8) Two {
    std::uint32_t word[2];
  };
  if (in_halves<Known>(call)) {
    const Two two = *in_global(reinterpret_cast<const Two*>(static_cast<const std::uint16_t*>(call.y.data) + at));
    found.word[0] = two.word[0];
    found.word[1] = two.word[1];
  } else if (Known::eights(call.y.reading)) {
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
template <typename Known>
__device__ __forceinline__ void add_to(const SharedLora& call, std::int64_t at, std::int64_t output, Outputs found,
                                       const float (&added)[4], Wish wish) {
  const bool halves = in_halves<Known>(call), brain = Known::dtype(call.y.dtype) == kBrain;
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t bits = found.word[i / 2] >> (i % 2 * 16) & 0xffffu;
    value[i] = !halves ? bits_to_float(found.word[i])
               : brain ? brain_to_float(bits)
                       : half_to_float(static_cast<std::uint16_t>(bits));
    value[i] = wish == kSpoil ? bits_to_float(0x7fc00000u) : value[i] + added[i];
  }
  if (!Known::eights(call.y.reading)) {
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

// Outputs of a turn: 16 to a warp.
constexpr int kOutputs = 16 * kWarps;

// What a lane holds of U for one turn: two outputs, at 8 of 32 columns.
template <typename Policy>
struct Held {
  Eight<typename Policy::Entry> u[2];
};

template <typename Known, typename Policy>
__device__ __forceinline__ Held<Policy> hold(const SharedLora& call, std::int64_t first, std::int64_t k) {
  using Entry = typename Policy::Entry;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const bool eights = Known::eights(call.u.reading);
  Held<Policy> held{};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    // so that a lane ends up with four outputs in a row
    const std::int64_t output = first + 16 * warp + 4 * (g / 2) + 2 * j + g % 2, from = k + 8 * t;
    if (output >= call.outputs || from >= call.rank_out) continue;
    const std::int64_t at = output * call.u.stride + from * Known::step(call.u.step);
    if (eights) {
      held.u[j] = get_eight<Entry>(call.u.data, at, Known::dtype(call.u.dtype));
      continue;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (from + i < call.rank_out)
        held.u[j].entry[i] = get<Entry>(call.u.data, at + i * call.u.step, Dtype(call.u.dtype));
  }
  return held;
}

// Asks for the outputs that a warp is to add to.
template <typename Known>
__device__ __forceinline__ void expect_outputs(const SharedLora& call, std::int64_t top, std::int64_t first) {
  const std::int64_t output = first + 16 * (threadIdx.x / 32), row = row_of(call, top, threadIdx.x % 32 / 2);
  const std::int64_t size = Known::dtype(call.y.dtype) == kFloat ? 4 : 2;
  const std::int64_t at = row * call.y.stride + output * Known::step(call.y.step);
  if (threadIdx.x % 2 == 0 && row >= 0 && output < call.outputs) expect(static_cast<char*>(call.y.data) + at * size);
}

// Grid: (call.height rows) x (call.wide outputs). Each warp prepares two rows; then it takes its outputs of all of
// them.
template <typename Policy, bool kPlain>
__global__ __launch_bounds__(kThreads, 2) void expand_kernel(const __grid_constant__ SharedLora call) {
  using Known = Known<kPlain, Policy::kDtype>;
  const std::int64_t across = (call.outputs + call.wide - 1) / call.wide;
  const std::int64_t top = blockIdx.x / across * call.height, begin = blockIdx.x % across * call.wide;
  const std::int64_t end = begin + call.wide < call.outputs ? begin + call.wide : call.outputs;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  Held<Policy> next = hold<Known, Policy>(call, begin, 0);
  expect_outputs<Known>(call, top, begin);
  const Room room = room_of<Known>(call);
  const int* wishes = prepare_rows<Known>(call, room, top, 1);
  // a row that the block does not have meets what it has of another, and is not written
  const int height = static_cast<int>(call.height), rows = rows_of(call, top);
  const float* lines[2] = {places_of(room, g < height ? g : 0).g, places_of(room, g + 8 < height ? g + 8 : 0).g};
  const std::int64_t line = (top + g) * call.y.stride;

  float sum[2][4] = {};
  std::int64_t k = 0;
  for (std::int64_t first = begin; first < end;) {
    const Held<Policy> held = next;
    const bool last = k + kDeep >= call.rank_out;
    const std::int64_t now = first, from = k;
    first = last ? first + kOutputs : first;
    k = last ? 0 : k + kDeep;
    if (first < end) {
      next = hold<Known, Policy>(call, first, k);
      if (last) expect_outputs<Known>(call, top, first);
    }
    const std::int64_t output = now + 16 * warp + 4 * t, at = line + output * Known::step(call.y.step);
    Outputs y[2] = {};
    if (last && output < call.outputs)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (g + 8 * i < rows) y[i] = outputs_of<Known>(call, at + 8 * i * call.y.stride, output);
    // where U has no columns there is nothing of g
    if (from < call.rank_out) add_products<Policy>(lines, part_of_g(call), static_cast<int>(from), held.u, sum);
    if (!last) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = g + 8 * i;
      if (r >= rows || output >= call.outputs || wishes[r] == kLeave) continue;
      float added[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        added[q] = sum[q / 2][2 * i + q % 2];
        if (wishes[r] == kAddOwn && output + q < call.outputs)
          added[q] = add_private<Known>(call, top + r, output + q, places_of(room, r).loads, added[q]);
      }
      add_to<Known>(call, at + 8 * i * call.y.stride, output, y[i], added, Wish(wishes[r]));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = 0;
  }
}

template <typename Policy>
auto expand_of(const SharedLora& call) {
  if constexpr (sizeof(typename Policy::Entry) == 2)
    if (call.height > kRows) return expand_many_kernel<Policy>;
  return is_plain(call) ? expand_kernel<Policy, true> : expand_kernel<Policy, false>;
}

}  // namespace loraspan

// path: 0 and 1 where x and v are both float16 or bfloat16, else 2. `call` lies in CPU memory and is copied into the
// launches; where it has slabs to each block of the first, x and V lie in runs of 16 bytes. `bytes` is the shared
// memory of a block of the second.
extern "C" int loraspan_cuda_shared_lora(std::int64_t path, const loraspan::SharedLora* call, std::int64_t tiles,
                                         std::int64_t blocks, std::int64_t bytes, void* stream) {
  using namespace loraspan;
  const bool many = call->each > 0;
  const auto first = path == 0   ? many ? shrink_many_kernel<false> : shrink_kernel<Halves<false>, 4>
                     : path == 1 ? many ? shrink_many_kernel<true> : shrink_kernel<Halves<true>, 4>
                                 : shrink_kernel<Floats<3>, 4>;
  const std::int64_t rows = private_right(*call) ? call->rows : 0;
  const int error = launch(first, tiles + rows, kThreads, stream, *call, tiles);
  if (error) return error;
  const auto second = call->u.dtype == kHalf    ? expand_of<Halves<false>>(*call)
                      : call->u.dtype == kBrain ? expand_of<Halves<true>>(*call)
                                                : expand_of<Floats<3>>(*call);
  const auto start = tiles + rows ? launch_after<SharedLora> : launch_with<SharedLora>;
  return start(bytes, second, blocks, kThreads, stream, *call);
}
