// gram: G = X X^T, and every other product of rows with rows, such as X V and V^T V.
//
// What a Gram matrix of R rows and d columns of b bytes costs on a card that reads B bytes and does F products a
// second: it reads b R d bytes and writes 8 R^2, and does R^2 d / 2 products, one triangle. So the floor is
//     max((b R d + 8 R^2) / B, R^2 d / (2 F)),
// and products decide from R = 2 b F / B rows on. Half precision, R = 1600, d = 4096, B = 3.35e12, F = 4.9e14 (H100):
// 13 + 20 MB in 10 us, 5.2e9 products in 11 us. Each tile of 128 x 64 reads its 192 rows from cache, 320 tiles of 1.6
// MB or 0.5 GB in all, at four times B 40 us: a third of the floor is to be expected, and half of it where R is small
// and X is read once. mma.sync reaches about 0.6 of F there. float32 has F = 3.3e13 and no tensor cores: 160 us, of
// which 0.6 is to be expected, shared memory being half as busy as the multipliers.
#include "dots.cuh"

extern "C" int loraspan_cuda_gram(std::int64_t path, const loraspan::Dots* jobs, std::int64_t count,
                                  std::int64_t blocks, std::int64_t sums, const loraspan::Row* rows, void* stream) {
  return loraspan::launch_dots<loraspan::RowsOnTheRight>(path, jobs, count, blocks, sums, rows, stream);
}
