// What both launches of shared_lora are told, and what a task is there.
#pragma once

#include "fragments.cuh"

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
  float* z;                   // [slabs, rows, rank_in], between the launches
  float* meeting;             // [rows, mixture, most[kSp] + most[kPp]]: x times private right ends
  std::int64_t slab, slabs;   // columns of x in one, and how many of them z has
  std::int64_t each;          // slabs that a block of the first launch takes, where rows are many
  std::int64_t height, wide;  // rows, 32 or at most 16, and outputs to a block of the second launch
  std::int64_t even;          // whether rows of `left` and `right` are whole runs of 8 entries, aligned to 16 bytes
};

constexpr int kWarps = kThreads / 32, kRows = 16;
// rows of shared memory, of four words more than whole banks
constexpr int kSpare = 4;
// columns of U to a turn
constexpr int kDeep = 32;

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

// What a kernel knows before it runs: where kPlain, that y, U and the tables of ends are of one dtype and lie in runs
// of 16 bytes, as models are served. It then is a fraction of the instructions.
template <bool kPlain, Dtype kDtype>
struct Known {
  __device__ __forceinline__ static Dtype dtype(std::int64_t said) { return kPlain ? kDtype : Dtype(said); }
  __device__ __forceinline__ static bool eights(std::int64_t reading) { return kPlain || reading == kEights; }
  __device__ __forceinline__ static std::int64_t step(std::int64_t said) { return kPlain ? 1 : said; }
  __device__ __forceinline__ static bool even(const SharedLora& call) { return kPlain || call.even; }
};

__host__ __device__ inline bool is_plain(const SharedLora& call) {
  return call.y.dtype == call.u.dtype && call.dtype == call.u.dtype && call.y.reading == kEights &&
         call.u.reading == kEights && call.even;
}

struct alignas(16) Four {
  float value[4];
};

}  // namespace loraspan
