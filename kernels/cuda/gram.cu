// gram: G = X X^T, and every other product of rows with rows, such as X V and V^T V.
//
// What a Gram matrix of R rows and d columns of b bytes costs on a card that reads B bytes and does F products a
// second: it reads b R d bytes and writes 8 R^2, and does R^2 d / 2 products, one triangle. So the floor is
//     max((b R d + 8 R^2) / B, R^2 d / (2 F)),
// and products decide from R = 2 b F / B rows on. Half precision, R = 1600, d = 4096, B = 3.35e12, F = 4.9e14 (H100):
// 13 + 20 MB in 10 us, 5.2e9 products in 11 us. Tiles of 128 x 64 read 192 rows from shared memory for as many products
// as take half of that time, and their sums, float64 every 96 columns, take as long again to convert. Larger tiles do
// not fit: every sum takes three registers, one in float32 and two in float64. On an H100 half precision reaches 0.09
// of the floor for one such matrix and 0.13 for 24; float32, with F = 3.3e13 and no tensor cores, 0.37 and 0.49;
// float64 0.21.
#include "dots.cuh"

extern "C" int loraspan_cuda_gram(std::int64_t path, const loraspan::Dots* jobs, std::int64_t count,
                                  std::int64_t blocks, std::int64_t sums, const loraspan::Row* rows, void* stream) {
  return loraspan::launch_dots<loraspan::RowsOnTheRight, 32>(path, jobs, count, blocks, sums, rows, stream);
}
