// reconstruct: out [m, p] = scale * basis [m, k] @ loadings [k, p], or scale * basis, for many pieces in one launch.
//
// A piece reads b m k + b k p bytes and writes b m p, for m k p products. With k = 64 and p = 16 in half precision each
// entry of the basis meets 16 loadings, far fewer than the 300 products a byte that cards can do, so the floor is the
// bytes: 0.66 MB for m = 4096, 0.2 us at 3.35e12 bytes a second, less than a launch takes. What counts is that hundreds
// of pieces go in one launch, and there 0.7 of the floor is to be expected: reads of the basis are of 16 bytes, but the
// 32 bytes of a row of `out` are written by 8 threads, and half of a tile's columns stand idle.
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
