// The kernels of one instruction set, and which sets this build has and this processor runs.
#pragma once

#include "loraspan/ceilings.hpp"
#include "loraspan/coding.hpp"
#include "loraspan/combine.hpp"
#include "loraspan/core_space.hpp"
#include "loraspan/dense.hpp"
#include "loraspan/gram.hpp"
#include "loraspan/packed.hpp"
#include "loraspan/product.hpp"
#include "loraspan/reconstruct.hpp"
#include "loraspan/shared_lora.hpp"
#include "loraspan/short_svd.hpp"
#include "loraspan/sketch.hpp"
#include "loraspan/sparse_sketch.hpp"
#include "loraspan/squares.hpp"

namespace loraspan {

struct Kernels {
  GramFn* gram;
  CombineFn* combine;
  SketchFn* sketch;
  PowerFn* power;
  ReconstructFn* reconstruct;
  SharedLoraFn* shared_lora;
  SparseSketchFn* sparse_sketch;
  SquaresFn* squares;
  ProductFn* product;
  EighFn* eigh;
  SvdFn* svd;
  RootFn* root;
  WhitenFn* whiten;
  JointGramFn* joint_gram;
  ShortSvdFn* short_svd;
  PackFn* pack;
  UnpackFn* unpack;
  EncodeFn* encode;
  DecodeFn* decode;
  TrellisFn* trellis;
  ArithmeticFn* arithmetic;
  TrafficFn* traffic;
};

struct Isa {
  const char* name;        // "baseline", "avx2", "avx512", "avx512bf16"
  const Kernels* kernels;  // null if this build lacks the set
  bool supported;          // by the processor at hand
};

inline constexpr int kIsaCount = 4;

// Narrowest first; the last one that is built and supported is the one to use.
const Isa* instruction_sets();

}  // namespace loraspan
