// The attention as an operator of PyTorch, in a library that compiled programs load without slabformer.
//
// Built against PyTorch's headers: -DHEAD_DIM=64 -DVALUE_DIM=64 -DTOKEN=float, or BFloat16, and a -DNAMESPACE that stands
// for these and for the sources. Folders with the same library may be loaded by one process: the first serves them all.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/new_empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <memory>
#include <optional>
#include <vector>

// one letter is a name in PyTorch's headers
#define D HEAD_DIM
#define E VALUE_DIM
#define Token TOKEN
#include "linear_attention.cpp"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

template <typename T>
struct Stored {
  static constexpr auto type = at::kFloat;
};
template <>
struct Stored<BFloat16> {
  static constexpr auto type = at::kBFloat16;
};

Tensor side_by_side(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

Optional whole(const Optional& x) { return x ? Optional(x->contiguous()) : x; }

template <typename T>
const T* pointer(const Optional& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

void check(const char* name, const Tensor& x, at::IntArrayRef shape, at::ScalarType type) {
  TORCH_CHECK_VALUE(x.sizes() == shape && x.scalar_type() == type, name, " must be ", type, " ", shape, ", got ",
                    x.scalar_type(), " ", x.sizes());
}

void check(const char* name, const Optional& x, at::IntArrayRef shape, at::ScalarType type) {
  if (x) check(name, *x, shape, type);
}

// Operands and the result are those of slabformer::linear_attention_native (linear_attention.py).
Tensor attention(const Tensor& q_given, const Tensor& k_given, const Tensor& v_given, const Optional& table_given,
                 const Optional& mask_given, const Optional& q_bias_given, const Optional& v_bias_given,
                 const Optional& taps_given, const Optional& bias_given, at::IntArrayRef grid_size, double eps) {
  TORCH_CHECK_VALUE(q_given.dim() == 4 && v_given.dim() == 4, "q and v must have 4 axes");
  const auto B = q_given.size(0), H = q_given.size(1), N = q_given.size(2), M = v_given.size(2);
  constexpr auto type = Stored<Token>::type;
  const int64_t sets = taps_given ? taps_given->size(0) : 1;
  const auto size = taps_given ? static_cast<int64_t>(std::lround(std::sqrt(taps_given->size(1)))) : 0;
  TORCH_CHECK_VALUE(!taps_given || (size % 2 == 1 && size <= LONGEST_KERNEL), "kernels must be odd, got ", size);
  check("q", q_given, {B, H, N, D}, type);
  check("k", k_given, {B, H, M, D}, type);
  check("v", v_given, {B, H, M, E}, type);
  check("table", table_given, {1, H, M, D}, type);
  check("mask", mask_given, {B, M}, at::kBool);
  check("q_bias", q_bias_given, {H, D}, at::kFloat);
  check("v_bias", v_bias_given, {H, E}, at::kFloat);
  check("taps", taps_given, {sets > 1 ? H : 1, size * size, E}, at::kFloat);
  check("bias", bias_given, {sets, E}, at::kFloat);
  TORCH_CHECK_VALUE(grid_size.size() == 2, "grid_size must be two numbers, got ", grid_size);
  TORCH_CHECK_VALUE(!taps_given || (grid_size[0] * grid_size[1] == N && N == M), "a convolution needs ", N,
                    " queries and ", M, " keys on one grid, got ", grid_size);
  auto out = q_given.new_empty({B, N, H, E}).transpose(1, 2);  // the projection behind reads tokens before heads
  if (B * H * N * M == 0) return out.zero_();
  const Tensor q = side_by_side(q_given), k = side_by_side(k_given), v = side_by_side(v_given);
  const Optional table = table_given ? Optional(side_by_side(*table_given)) : table_given;
  const Optional mask = whole(mask_given), q_bias = whole(q_bias_given), v_bias = whole(v_bias_given);
  const Optional taps = whole(taps_given), bias = whole(bias_given);
  std::vector<int64_t> numbers{B, H, N, M, size, size ? grid_size[0] : 0, size ? grid_size[1] : 0, sets};
  for (const auto& x : {q, k, v, out}) numbers.insert(numbers.end(), x.strides().begin(), x.strides().end() - 1);
  for (int axis : {1, 2}) numbers.push_back(table ? table->stride(axis) : 0);
  const int failed = linear_attention(
      static_cast<const Token*>(q.const_data_ptr()), static_cast<const Token*>(k.const_data_ptr()),
      static_cast<const Token*>(v.const_data_ptr()), pointer<Token>(table), pointer<bool>(mask), pointer<float>(q_bias),
      pointer<float>(v_bias), pointer<float>(taps), pointer<float>(bias), static_cast<Token*>(out.mutable_data_ptr()),
      numbers.data(), static_cast<float>(eps), at::get_num_threads());
  TORCH_CHECK_WITH(OutOfMemoryError, failed == 0, "linear attention of ", q.sizes(), " queries and ", M,
                   " keys does not fit the memory");
  return out;
}

struct Registered {
  torch::Library library;

  static std::unique_ptr<Registered> once() {
    if (c10::Dispatcher::singleton().findSchema({TEXT(NAMESPACE) "::linear_attention", ""})) return nullptr;
    return std::make_unique<Registered>();
  }

  Registered() : library(torch::Library::FRAGMENT, TEXT(NAMESPACE), std::nullopt, __FILE__, __LINE__) {
    library.def(
        "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? mask, Tensor? q_bias, Tensor? v_bias, "
        "Tensor? taps, Tensor? bias, int[] grid_size, float eps) -> Tensor");
    library.impl("linear_attention", torch::dispatch(c10::DispatchKey::CPU, attention));
  }
};

const auto registered = Registered::once();

}  // namespace
