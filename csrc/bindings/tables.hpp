// What Python hands over: addresses, and tables of sizes and strides.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "loraspan/isa.hpp"

namespace loraspan::bindings {

namespace py = pybind11;

// int64 [count, fields]: one row per block or job, the fields in the order in which the functions below read them.
using Table = py::array_t<std::int64_t, py::array::c_style>;

inline const Kernels& kernels_named(const std::string& name) {
  const Isa* isas = instruction_sets();
  for (int i = 0; i < kIsaCount; ++i)
    if (name == isas[i].name && isas[i].kernels && isas[i].supported) return *isas[i].kernels;
  throw py::value_error("_core: no instruction set '" + name + "' here");
}

template <typename T>
T* address(std::int64_t value) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value));
}

inline std::vector<Block> read_blocks(const Table& table) {
  const auto rows = table.unchecked<2>();
  std::vector<Block> blocks;
  blocks.reserve(static_cast<std::size_t>(rows.shape(0)));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i)
    blocks.push_back({address<const void>(rows(i, 0)), rows(i, 1), rows(i, 2), rows(i, 3), Dtype(rows(i, 4))});
  return blocks;
}

template <typename Job, typename Read>
std::vector<Job> read_jobs(const Table& table, const Read& read) {
  const auto rows = table.unchecked<2>();
  std::vector<Job> jobs;
  jobs.reserve(static_cast<std::size_t>(rows.shape(0)));
  for (py::ssize_t i = 0; i < rows.shape(0); ++i)
    jobs.push_back(read([&](py::ssize_t field) { return rows(i, field); }));
  return jobs;
}

// Address, row stride, column stride, dtype; of a packed matrix codes, scales, length of its columns, dtype.
template <typename Field>
Matrix read_matrix(const Field& field) {
  const auto dtype = Dtype(field(3));
  if (dtype >= Dtype::packed8)
    return {address<void>(field(0)), 0, 0, dtype, address<const std::uint16_t>(field(1)), field(2)};
  return {address<void>(field(0)), field(1), field(2), dtype};
}

template <typename Field>
Rows read_rows(const std::vector<Block>& blocks, const Field& field) {
  return {blocks.data() + field(0), field(1), field(2)};
}

// What works on single matrices, rows and numbers, beside the operators over blocks.
void bind_small(py::module_& m);

// A file in memory.
void bind_mapping(py::module_& m);

// What tensors are.
void bind_tensors(py::module_& m);

}  // namespace loraspan::bindings
