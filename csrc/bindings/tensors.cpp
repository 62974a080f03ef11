// What torch's tensors are, asked of torch itself through the table of C functions that DLPack describes
// (dmlc/dlpack, DLPackExchangeAPI, version 1), which takes less time than their attributes in Python. Nothing here is
// linked with torch. What is out of the ordinary is left to those who ask in Python.
#include <unordered_map>

#include "tables.hpp"

namespace loraspan::bindings {

namespace {

struct DLDevice {
  std::int32_t type, id;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t dimensions;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLPackExchange {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

// A matrix in the memory of the CPU.
struct Seen {
  std::int64_t address, rows, columns, row_stride, column_stride, dtype;
};

// -1 for what the kernels do not read.
inline std::int64_t dtype_of(const DLTensor& t) {
  constexpr std::uint8_t kFloat = 2, kBfloat = 4;
  if (t.dtype.lanes != 1) return -1;
  if (t.dtype.code == kBfloat && t.dtype.bits == 16) return static_cast<std::int64_t>(Dtype::bf16);
  if (t.dtype.code != kFloat) return -1;
  switch (t.dtype.bits) {
    case 16:
      return static_cast<std::int64_t>(Dtype::f16);
    case 32:
      return static_cast<std::int64_t>(Dtype::f32);
    case 64:
      return static_cast<std::int64_t>(Dtype::f64);
    default:
      return -1;
  }
}

class TensorReader {
 public:
  TensorReader(const py::capsule& exchange, py::list types)
      : types_{std::move(types)},
        exchange_{static_cast<const DLPackExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"))},
        is_neg_{py::str("is_neg")} {
    if (!exchange_) throw py::error_already_set();
    if (exchange_->version.major != 1 || !exchange_->tensor_from_object)
      throw py::value_error("_core: this version of DLPack's exchange of tensors is not known");
  }

  // int64 [count, 5]: address, rows, strides and dtype of matrices that all have so many columns; the rows of each; and
  // a bit for every dtype that one has. None if one has other columns or is no plain matrix in the memory of the CPU.
  py::object blocks(const py::sequence& matrices, std::int64_t columns) const {
    const auto count = static_cast<py::ssize_t>(py::len(matrices));
    Table table({count, py::ssize_t{5}});
    auto rows = table.mutable_unchecked<2>();
    py::list heights(count);
    int dtypes = 0;
    for (py::ssize_t i = 0; i < count; ++i) {
      Seen seen;
      if (!see(py::object(matrices[static_cast<std::size_t>(i)]).ptr(), &seen) || seen.columns != columns)
        return py::none();
      const std::int64_t fields[] = {seen.address, seen.rows, seen.row_stride, seen.column_stride, seen.dtype};
      for (py::ssize_t f = 0; f < 5; ++f) rows(i, f) = fields[f];
      heights[static_cast<std::size_t>(i)] = seen.rows;
      dtypes |= 1 << seen.dtype;
    }
    return py::make_tuple(table, heights, dtypes);
  }

  // The jobs of pieces (basis, loadings or None, out, scale) and their scales; None if one of them does not fit or is
  // not of plain matrices in the memory of the CPU. A basis that many pieces share is asked but once.
  py::object pieces(const py::list& pieces) const {
    const auto count = static_cast<py::ssize_t>(pieces.size());
    Table table({count, py::ssize_t{15}});
    py::array_t<double> scale_table(count);
    auto jobs = table.mutable_unchecked<2>();
    auto scales = scale_table.mutable_unchecked<1>();
    std::unordered_map<PyObject*, Seen> bases;
    for (py::ssize_t i = 0; i < count; ++i) {
      PyObject* piece = PyList_GET_ITEM(pieces.ptr(), i);
      if (!PyTuple_Check(piece) || PyTuple_GET_SIZE(piece) != 4) return py::none();
      const auto part = [piece](py::ssize_t at) { return PyTuple_GET_ITEM(piece, at); };
      const auto [basis, fresh] = bases.try_emplace(part(0));
      Seen loadings = {0, 0, 0, 0, 0, 0}, out;
      if (fresh && !see(part(0), &basis->second)) return py::none();
      const Seen& of = basis->second;
      const bool has_loadings = part(1) != Py_None;
      if ((has_loadings && !see(part(1), &loadings)) || !see(part(2), &out)) return py::none();
      const std::int64_t width = has_loadings ? loadings.columns : of.columns;
      if (has_loadings && loadings.rows != of.columns) return py::none();
      if (out.rows != of.rows || out.columns != width) return py::none();
      scales(i) = PyFloat_AsDouble(part(3));
      if (scales(i) == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return py::none();
      }
      py::ssize_t at = 0;
      for (const Seen* s : {&of, static_cast<const Seen*>(&loadings), static_cast<const Seen*>(&out)})
        for (const std::int64_t field : {s->address, s->row_stride, s->column_stride, s->dtype}) jobs(i, at++) = field;
      for (const std::int64_t size : {of.rows, of.columns, width}) jobs(i, at++) = size;
    }
    return py::make_tuple(table, scale_table);
  }

 private:
  // Whether a tensor is a plain matrix, and what it is. An address of 0 stands for none, so an empty matrix gets
  // another: nothing is read there.
  bool see(PyObject* object, Seen* seen) const {
    if (!is_plain(object)) return false;
    DLTensor t;
    if (exchange_->tensor_from_object(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    constexpr std::int32_t kCpu = 1;
    const std::int64_t dtype = dtype_of(t);
    if (t.device.type != kCpu || t.dimensions != 2 || dtype < 0) return false;
    const auto address =
        static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data)) + static_cast<std::int64_t>(t.byte_offset);
    const bool empty = t.shape[0] == 0 || t.shape[1] == 0;
    if (address == 0 && !empty) return false;
    *seen = {address ? address : 1, t.shape[0], t.shape[1], t.strides[0], t.strides[1], dtype};
    return true;
  }

  // Of the very types that are given, whose memory says their values.
  bool is_plain(PyObject* object) const {
    for (const py::handle type : types_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == type.ptr()) {
        const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, is_neg_.ptr()));
        if (!negated) PyErr_Clear();
        return negated.ptr() == Py_False;
      }
    return false;
  }

  py::list types_;
  const DLPackExchange* exchange_;
  py::str is_neg_;
};

}  // namespace

void bind_tensors(py::module_& m) {
  py::class_<TensorReader>(m, "TensorReader")
      .def(py::init<py::capsule, py::list>(), py::arg("exchange"), py::arg("types"))
      .def("blocks", &TensorReader::blocks, py::arg("matrices"), py::arg("columns"))
      .def("pieces", &TensorReader::pieces, py::arg("pieces"));
}

}  // namespace loraspan::bindings
