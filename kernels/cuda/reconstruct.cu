// reconstruct: out [m, p] = scale * basis [m, k] @ loadings [k, p], or scale * basis, for many pieces in one launch.
//
// A piece reads b m k + b k p bytes and writes b m p, for m k p products. With k = 64 and p = 16 in half precision each
// entry of the basis meets 16 loadings, far fewer than the 300 products a byte that cards can do, so the floor is the
// bytes: 0.66 MB for m = 4096, 0.2 us at 3.35e12 bytes a second, less than a launch takes. What counts is that hundreds
// of pieces go in one launch, and that pieces on one basis follow each other: a warp holds its rows of the basis and
// reads loadings only, 2 KB from the L1 cache for the 1 KB that it writes. On an H100, 100 tasks of 24 pieces take
// 0.26 ms in a CUDA graph, 0.32 of the floor, and 1.35 ms in float32, 0.22 of it: there a product is six.
//
// So it is where vectors of the basis and of the loadings are whole runs of 16 bytes. Other pieces go by tiles in
// shared memory, half of which stand idle at 16 columns.
#include "fragments.cuh"
#include "tiles.cuh"

namespace loraspan {

struct Piece {
  std::int64_t first_block, tiles;  // tiles of one member
  Matrix basis, loadings, out;      // loadings.data is null for none
  std::int64_t rows, rank, columns;
  double scale;
};

// As many as fit into the 4 KB of a kernel's arguments, so that nothing is uploaded: a graph keeps them.
constexpr int kPieces = 16;
struct Pieces {
  std::int64_t count;
  Piece piece[kPieces];
};

// scale * sum, rounded once; T is what sums are kept in.
template <typename T>
__device__ __forceinline__ void write(const Piece& piece, std::int64_t member, std::int64_t row, std::int64_t col,
                                      T sum) {
  const std::int64_t index = member * piece.out.apart + row * piece.out.stride + col * piece.out.step;
  put(piece.out.data, index, Dtype(piece.out.dtype), static_cast<T>(piece.scale) * sum);
}

template <typename T>
__device__ __forceinline__ void multiply_all(Plain<T>& sums, const typename Plain<T>::Left& left,
                                             const typename Plain<T>::Right& right, std::int64_t) {
  sums.multiply(left, right);
}

template <bool kBrain>
__device__ __forceinline__ void multiply_all(Tensor<kBrain>& sums, const typename Tensor<kBrain>::Left& left,
                                             const typename Tensor<kBrain>::Right& right, std::int64_t rest) {
  sums.multiply_by_eights(left, right, rest < Tensor<kBrain>::kDepth ? static_cast<int>(rest) : Tensor<kBrain>::kDepth);
}

// Grid: (tiles of out) x (members) of every piece. Sums run over all of k, in float32 or float64.
template <typename Policy>
__global__ __launch_bounds__(kThreads, 2) void reconstruct_kernel(const __grid_constant__ Pieces pieces) {
  int which = 0;
  while (which + 1 < pieces.count && pieces.piece[which + 1].first_block <= blockIdx.x) ++which;
  const Piece& piece = pieces.piece[which];
  const std::int64_t block = blockIdx.x - piece.first_block, member = block / piece.tiles;
  const std::int64_t wide = (piece.columns + Policy::kCols - 1) / Policy::kCols, tile = block % piece.tiles;
  const std::int64_t top = tile / wide * Policy::kRows, side = tile % wide * Policy::kCols;

  const EvenRows basis = lines_of(piece.basis, member, false), loadings = lines_of(piece.loadings, member, true);
  Policy sums;
  step_through<Policy::kDepth>(
      shared<PairsOf<Policy>>(), 0, piece.rank,
      [&](auto& pair, std::int64_t k) {
        stage(pair.left, basis, top, piece.rows, k, piece.rank, Reading(piece.basis.reading));
        stage(pair.right, loadings, side, piece.columns, k, piece.rank, Reading(piece.loadings.reading));
      },
      [&](auto& pair, std::int64_t k) { multiply_all(sums, pair.left, pair.right, piece.rank - k); });
  sums.each([&](int r, int c, int, auto sum) {
    if (top + r < piece.rows && side + c < piece.columns) write(piece, member, top + r, side + c, sum);
  });
}

// Pieces on one basis, alike in all but where they are; or the members of a batch.
struct Group {
  std::int64_t first_block, tiles;  // tiles of rows
  std::int64_t first, count, each;  // members, and how many of them to a block
  std::int64_t batch;               // whether members are `apart` from the first one, and not in the table
  Matrix basis, loadings, out;      // of the two latter, data is in the table
  std::int64_t rows, rank, columns;
};

struct Member {
  void *loadings, *out;
  double scale;
};

// As many as fit into the 4 KB of a kernel's arguments.
constexpr int kGroups = 8, kMembers = 96;
struct Groups {
  std::int64_t count;
  Group group[kGroups];
  Member member[kMembers];
};

// Columns [k, k + kDeep) of 2 lines, g and g + 8 of 16 or, `paired`, one of each of two tiles of 8, such that a lane's
// sums lie beside each other.
template <typename Policy>
struct Lines {
  static constexpr int kDeep = 128 / static_cast<int>(sizeof(typename Policy::Entry));
  typename Policy::Run run[kDeep / 32][2];

  __device__ __forceinline__ void read(const EvenRows& from, std::int64_t first, std::int64_t lines, bool paired,
                                       std::int64_t k, std::int64_t rank) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < kDeep / 32; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::int64_t line = first + (paired ? 4 * (g / 2) + g % 2 + 2 * i : g + 8 * i), at = k + 32 * c + 8 * t;
        run[c][i] = {};
        if (line < lines && at < rank)
          run[c][i] = get_eight<typename Policy::Entry>(from(line).data, at, Dtype(from.dtype));
      }
  }
};

// Four sums beside each other in `out`, `step` entries apart, of which `inside` are wanted.
__device__ __forceinline__ void put_four(void* out, std::int64_t at, std::int64_t step, std::int64_t inside,
                                         Dtype dtype, const float (&value)[4]) {
  struct alignas(8) Two {
    std::uint32_t word[2];
  };
  const bool whole = step == 1 && inside >= 4;
  if (whole && dtype == kFloat && (reinterpret_cast<std::uintptr_t>(out) / 4 + at) % 4 == 0) {
    Quad four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.word[i] = float_to_bits(value[i]);
    *reinterpret_cast<Quad*>(static_cast<float*>(out) + at) = four;
  } else if (whole && dtype != kFloat && (reinterpret_cast<std::uintptr_t>(out) / 2 + at) % 4 == 0) {
    Two two;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = value[2 * i], high = value[2 * i + 1];
      two.word[i] = dtype == kBrain ? float_to_bfloat(low) | static_cast<std::uint32_t>(float_to_bfloat(high)) << 16
                                    : float_to_half(low) | static_cast<std::uint32_t>(float_to_half(high)) << 16;
    }
    *reinterpret_cast<Two*>(static_cast<std::uint16_t*>(out) + at) = two;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < inside) put(out, at + i * step, dtype, value[i]);
  }
}

// Grid: (tiles of rows, kHeld times 16 to a warp) x (runs of members) of every group. The launches of one call write to
// different places: none has to wait for the one before, but for its end to be the end of both.
template <typename Policy, int kHeld>
__global__ __launch_bounds__(kThreads, 2) void grouped_kernel(const __grid_constant__ Groups groups) {
  constexpr int kDeep = Lines<Policy>::kDeep;
  let_next_begin();
  int which = 0;
  while (which + 1 < groups.count && groups.group[which + 1].first_block <= blockIdx.x) ++which;
  const Group& group = groups.group[which];
  const std::int64_t block = blockIdx.x - group.first_block, rank = group.rank;
  const std::int64_t top = (block % group.tiles * (kThreads / 32) + threadIdx.x / 32) * (16 * kHeld);
  const std::int64_t begin = block / group.tiles * group.each;
  const std::int64_t end = begin + group.each < group.count ? begin + group.each : group.count;
  // rows beside each other: they take the place of columns, so that those of a lane still lie beside each other
  const bool upright = group.out.stride < group.out.step;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  Lines<Policy> held[kHeld], next;
  const auto read_held = [&](std::int64_t k, std::int64_t member) {
    const EvenRows basis = lines_of(group.basis, group.batch ? member : 0, false);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) held[h].read(basis, top + 16 * h, group.rows, upright, k, rank);
  };
  const auto read_next = [&](std::int64_t k, std::int64_t member, std::int64_t side) {
    Matrix loadings = group.loadings;
    loadings.data = groups.member[group.first + (group.batch ? 0 : member)].loadings;
    next.read(lines_of(loadings, group.batch ? member : 0, true), side, group.columns, !upright, k, rank);
  };

  float sum[kHeld][2][4] = {};
  std::int64_t member = begin, side = 0, k = 0;
  if (member < end && top < group.rows) {
    read_held(0, member);
    read_next(0, member, 0);
  }
  while (member < end && top < group.rows) {
    const Lines<Policy> met = next;
    const std::int64_t now = member, from = side;
    const bool last = k + kDeep >= rank, turned = last && side + 16 >= group.columns;
    k = last ? 0 : k + kDeep;
    side = turned ? 0 : last ? side + 16 : side;
    member = turned ? member + 1 : member;
    if (member < end) read_next(k, member, side);
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int c = 0; c < kDeep / 32; ++c)
        if (upright)
          Policy::multiply(sum[h], met.run[c], held[h].run[c]);
        else
          Policy::multiply(sum[h], held[h].run[c], met.run[c]);
    if (member < end && (rank > kDeep || (turned && group.batch))) read_held(k, member);
    if (!last) continue;
    const Member& own = groups.member[group.first + (group.batch ? 0 : now)];
    const auto scale = static_cast<float>(own.scale);
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::int64_t row = top + 16 * h + (upright ? 4 * t : g + 8 * i);
        const std::int64_t col = from + (upright ? g + 8 * i : 4 * t);
        float value[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          value[q] = scale * sum[h][q / 2][2 * i + q % 2];
          sum[h][q / 2][2 * i + q % 2] = 0;
        }
        if (row >= group.rows || col >= group.columns) continue;
        const std::int64_t at =
            (group.batch ? now * group.out.apart : 0) + row * group.out.stride + col * group.out.step;
        put_four(own.out, at, upright ? group.out.stride : group.out.step,
                 upright ? group.rows - row : group.columns - col, Dtype(group.out.dtype), value);
      }
  }
  wait_for_last();
}

// The pieces without loadings. Grid: 4096 entries to a block, in the order in which they lie in `out`.
constexpr int kEntries = 4096;
template <typename T>
__global__ __launch_bounds__(kThreads) void convert_kernel(const __grid_constant__ Pieces pieces) {
  int which = 0;
  while (which + 1 < pieces.count && pieces.piece[which + 1].first_block <= blockIdx.x) ++which;
  const Piece& piece = pieces.piece[which];
  const std::int64_t block = blockIdx.x - piece.first_block, member = block / piece.tiles;
  const EvenRows basis = lines_of(piece.basis, member, false);
  const bool upright = piece.out.stride < piece.out.step;
  for (int i = threadIdx.x; i < kEntries; i += kThreads) {
    const std::int64_t at = block % piece.tiles * kEntries + i;
    if (at >= piece.rows * piece.columns) return;
    const std::int64_t row = upright ? at % piece.rows : at / piece.columns;
    const std::int64_t col = upright ? at / piece.rows : at % piece.columns;
    const Row line = basis(row);
    write(piece, member, row, col, get<T>(line.data, col * line.stride, Dtype(line.dtype)));
  }
}

}  // namespace loraspan

// path: 0 float16 and 1 bfloat16 on tensor cores, 2 sums in float32, 3 in float64; 4 and more: pieces without loadings.
// `pieces` lies in CPU memory and is copied into the launch.
extern "C" int loraspan_cuda_reconstruct(std::int64_t path, const loraspan::Pieces* pieces, std::int64_t blocks,
                                         void* stream) {
  using namespace loraspan;
  const auto kernel = path == 0   ? reconstruct_kernel<Tensor<false>>
                      : path == 1 ? reconstruct_kernel<Tensor<true>>
                      : path == 2 ? reconstruct_kernel<Plain<float>>
                      : path == 3 ? reconstruct_kernel<Plain<double>>
                      : path == 4 ? convert_kernel<float>
                                  : convert_kernel<double>;
  return launch(kernel, blocks, kThreads, stream, *pieces);
}

// path: 0 float16 and 1 bfloat16, 2 any that are summed in float32; all lines of groups are read by eights. `chained`:
// whether the launch before on this stream was of this kind and call.
extern "C" int loraspan_cuda_reconstruct_groups(std::int64_t path, const loraspan::Groups* groups, std::int64_t blocks,
                                                std::int64_t chained, void* stream) {
  using namespace loraspan;
  const auto kernel = path == 0   ? grouped_kernel<Halves<false>, 2>
                      : path == 1 ? grouped_kernel<Halves<true>, 2>
                                  : grouped_kernel<Floats<3>, 1>;
  const auto start = chained ? launch_after<Groups> : launch_with<Groups>;
  return start(0, kernel, blocks, kThreads, stream, *groups);
}
