// What the second launch of shared_lora makes of a row before it meets U: z, the loads of its columns, g.
#pragma once

#include "shared_lora.cuh"

namespace loraspan {

__device__ __forceinline__ std::int64_t whole(std::int64_t count, std::int64_t of) {
  return (count + of - 1) / of * of;
}

// Where a block of the second launch keeps its rows: z and g, with zeros after them, the load of each column of each
// task.
struct Places {
  float *z, *loads, *g;
};

// Entries of one of the three parts of g: where U is of bfloat16, so is g.
__device__ __forceinline__ int part_of_g(const SharedLora& call) { return static_cast<int>(whole(call.rank_out, 32)); }

// Of the shared memory of a row, in floats: where its loads and its g begin, and where the next row does.
struct Room {
  int loads, g, size;
};

template <typename Known>
__device__ __forceinline__ Room room_of(const SharedLora& call) {
  const int z = static_cast<int>(whole(call.rank_in, 8) + kSpare);
  const int loads = static_cast<int>(whole(call.mixture * columns_at_most(call), 4));
  const bool brains = Known::dtype(call.u.dtype) == kBrain;
  const auto g = static_cast<int>(brains ? part_of_g(call) * 3 / 2 : whole(call.rank_out, 32));
  // two rows beside each other, of which a lane reads 16 bytes at a time, are to lie in different banks
  const int size = z + loads + g, apart = brains ? 16 : 4;
  return {z, z + loads, size + (apart + 32 - size % 32) % 32};
}

__device__ __forceinline__ Places places_of(const Room& room, int row) {
  float* start = given() + row * room.size;
  return {start, start + room.loads, start + room.g};
}

// Puts entries [k, k + 8) of g where they are read.
template <typename Known>
__device__ __forceinline__ void put_g(const SharedLora& call, const Places& place, std::int64_t k,
                                      const float (&g)[8]) {
  if (Known::dtype(call.u.dtype) != kBrain) {
#pragma unroll
    for (int e = 0; e < 8; ++e) place.g[k + e] = g[e];
    return;
  }
  Eight<std::uint16_t> part[3];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const Brains split(g[e]);
#pragma unroll
    for (int p = 0; p < 3; ++p) part[p].entry[e] = split.part[p];
  }
  auto* to = reinterpret_cast<std::uint16_t*>(place.g) + k;
#pragma unroll
  for (int p = 0; p < 3; ++p) *reinterpret_cast<Quad*>(to + p * part_of_g(call)) = part[p].quad[0];
}

// Whose turn a lane has where a warp prepares two rows, 16 lanes to each: `pair` is which of two columns, `eight` which
// 8 of 64 entries.
struct Lane {
  int pair, eight;
  __device__ __forceinline__ Lane() : pair(threadIdx.x % 16 / 8), eight(threadIdx.x % 8) {}
};

// Entries [k, k + 8) of row `row` of a table; zeros at and past `rank`.
template <typename Known, typename Entry>
__device__ __forceinline__ Eight<Entry> run_of_table(const SharedLora& call, const void* table, std::int64_t row,
                                                     std::int64_t k, std::int64_t rank, bool inside) {
  Eight<Entry> run{};
  if (!inside || k >= rank) return run;
  if (Known::even(call)) return get_eight<Entry>(table, row * rank + k, Known::dtype(call.dtype));
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (k + i < rank) run.entry[i] = get<Entry>(table, row * rank + k + i, Dtype(call.dtype));
  return run;
}

template <typename Known, typename Entry>
__device__ __forceinline__ float value_of(const SharedLora& call, Entry entry) {
  if constexpr (sizeof(Entry) == 4)
    return entry;
  else
    return Known::dtype(call.dtype) == kBrain ? brain_to_float(entry) : half_to_float(entry);
}

// Slabs of z that are on their way at once; on older cards ptxas has no registers for more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSlabsAtOnce = 8;
#else
constexpr int kSlabsAtOnce = 16;
#endif

// z of a row: the sums of its slabs in their order.
template <typename Known>
__device__ __forceinline__ void add_slabs(const SharedLora& call, std::int64_t row, const Places& place) {
  const int lane = threadIdx.x % 16;
  const std::int64_t apart = call.rows * call.rank_in;
  const float* from = call.z + row * call.rank_in;
  if (Known::even(call) || call.rank_in % 4 == 0) {
    for (std::int64_t k = 4 * lane; k < call.rank_in; k += 64) {
      Four sum = {};
#pragma unroll kSlabsAtOnce
      for (std::int64_t slab = 0; slab < call.slabs; ++slab) {
        const Four part = *in_global(reinterpret_cast<const Four*>(from + slab * apart + k));
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.value[i] += part.value[i];
      }
      *reinterpret_cast<Four*>(place.z + k) = sum;
    }
  } else {
    for (std::int64_t k = lane; k < call.rank_in; k += 16) {
      float sum = 0;
      for (std::int64_t slab = 0; slab < call.slabs; ++slab) sum += from[slab * apart + k];
      place.z[k] = sum;
    }
  }
  for (std::int64_t k = call.rank_in + lane; k < whole(call.rank_in, 8); k += 16) place.z[k] = 0;
}

// The larger of what both rows of a warp have: their lanes go through the same turns.
__device__ __forceinline__ int larger(std::int64_t count) {
  const float other = other_lane(static_cast<float>(count), 16);
  return static_cast<float>(count) < other ? static_cast<int>(other) : static_cast<int>(count);
}

// weight * share * scale * (right end . x) of every column of a task, 16 or 8 columns at a time.
template <typename Known, typename Entry>
__device__ __forceinline__ void make_loads(const SharedLora& call, const std::int64_t* task, const float* meeting,
                                           const float* z, float factor, float* loads) {
  constexpr int kAtOnce = sizeof(Entry) == 2 ? 8 : 4;
  const Lane lane;
  const std::int64_t ss = task ? task[kSs] : 0, sp = task ? task[kSp] : 0, ps = task ? task[kPs] : 0;
  const std::int64_t count = task ? ss + sp + ps + task[kPp] : 0, first = task ? task[kRight] : 0;
  const bool dense = task && task[kDense];
  const int most = larger(count);
  for (int from = 0; from < most; from += 2 * kAtOnce) {
    float dot[kAtOnce] = {};
    for (std::int64_t k = 8 * lane.eight; k < whole(call.rank_in, 64); k += 64) {
      Eight<Entry> run[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const std::int64_t c = from + 2 * i + lane.pair;
        const bool on_v = c < ss ? !dense : c >= ss + sp && c < ss + sp + ps;
        run[i] = run_of_table<Known, Entry>(call, call.right, first + (c < ss ? c : c - ss - sp + (dense ? 0 : ss)), k,
                                            call.rank_in, on_v);
      }
      if (k < call.rank_in)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int e = 0; e < 8; ++e) dot[i] = fused(value_of<Known>(call, run[i].entry[e]), z[k + e], dot[i]);
    }
    float mine = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int apart = 4; apart > 0; apart /= 2) dot[i] += other_lane(dot[i], apart);
      if (lane.eight == i) mine = dot[i];
    }
    const std::int64_t c = from + 2 * lane.eight + lane.pair;
    if (lane.eight >= kAtOnce || c >= count) continue;
    if (c < ss && dense) mine = z[c];
    if (c >= ss && c < ss + sp) mine = meeting[c - ss];
    if (c >= ss + sp + ps) mine = meeting[c - ss - ps];
    loads[c] = call.weights[task[kWeights] + c] * factor * mine;
  }
}

// g += the columns of a task by their loads, at outputs [k, k + 8) of U's columns: even ones, then odd ones.
template <typename Known, typename Entry>
__device__ __forceinline__ void add_columns(const SharedLora& call, const std::int64_t* task, const float* loads,
                                            std::int64_t k, float (&g)[8]) {
  constexpr int kAtOnce = sizeof(Entry) == 2 ? 8 : 4;
  const Lane lane;
  const std::int64_t count = task ? task[kSs] + task[kSp] : 0, first = task ? task[kLeft] : 0;
  for (std::int64_t from = lane.pair; from < count; from += 2 * kAtOnce) {
    Eight<Entry> run[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      run[i] =
          run_of_table<Known, Entry>(call, call.left, first + from + 2 * i, k, call.rank_out, from + 2 * i < count);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (from + 2 * i < count)
#pragma unroll
        for (int e = 0; e < 8; ++e) g[e] = fused(loads[from + 2 * i], value_of<Known>(call, run[i].entry[e]), g[e]);
  }
}

// z, the loads and g of two rows by one warp, 16 lanes to each; a row of -1 is none.
template <typename Known, typename Entry>
__device__ __forceinline__ void prepare(const SharedLora& call, std::int64_t row, const Places& place) {
  const Lane lane;
  const std::int64_t most = columns_at_most(call);
  if (row >= 0) add_slabs<Known>(call, row, place);
  __syncwarp();
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t at = row * call.mixture + m;
    const std::int64_t* task = row < 0 ? nullptr : task_of(call, call.tasks[at]);
    const float factor = static_cast<float>(call.scale) * (call.shares && task ? call.shares[at] : 1.0f);
    make_loads<Known, Entry>(call, task, call.meeting + at * private_right(call), place.z, factor,
                             place.loads + m * most);
  }
  __syncwarp();
  for (std::int64_t k = 8 * lane.eight; k < whole(call.rank_out, 64); k += 64) {
    float g[8] = {};
    for (std::int64_t m = 0; m < call.mixture; ++m) {
      const std::int64_t* task = row < 0 ? nullptr : task_of(call, call.tasks[row * call.mixture + m]);
      add_columns<Known, Entry>(call, task, place.loads + m * most, k, g);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) g[e] += other_lane(g[e], 8);
    // zeros past the last column of U too
    if (row >= 0 && lane.pair == 0 && k < whole(call.rank_out, 32)) put_g<Known>(call, place, k, g);
  }
}

// What a row wants done: nothing, its sum, that with private left ends, or NaN because a task is out of range.
enum Wish : int { kLeave, kAdd, kAddOwn, kSpoil };

__device__ __forceinline__ Wish wish_of(const SharedLora& call, std::int64_t row) {
  Wish wish = kLeave;
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t task = call.tasks[row * call.mixture + m];
    if (task == -1) continue;
    const std::int64_t* found = task_of(call, task);
    if (!found) return kSpoil;
    wish = wish == kAddOwn || found[kPs] + found[kPp] ? kAddOwn : kAdd;
  }
  return wish;
}

// Private left ends of the row's tasks at one output.
template <typename Known>
__device__ __forceinline__ float add_private(const SharedLora& call, std::int64_t row, std::int64_t output,
                                             const float* loads, float sum) {
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t* task = task_of(call, call.tasks[row * call.mixture + m]);
    if (!task) continue;
    const float* own = loads + m * columns_at_most(call) + task[kSs] + task[kSp];
#pragma unroll 4
    for (std::int64_t i = 0; i < task[kPs] + task[kPp]; ++i)
      sum = fused(
          own[i],
          get<float>(call.left_private, (task[kLeftPrivate] + i) * call.outputs + output, Known::dtype(call.dtype)),
          sum);
  }
  return sum;
}

}  // namespace loraspan
