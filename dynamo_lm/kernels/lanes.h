// What the kernels share: vectors of eight float32, bfloat16 as halves of them, sums that are always in one order.
//
// Every result of a kernel is summed in an order that depends on nothing but the problem of its own row: it is the same, bit for
// bit, whichever rows are computed beside it and however many threads share the work.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>
#ifdef __FMA__
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t STRIDE = 16;  // entries that are taken at a time: two of bfloat16 lie in one 32-bit lane

typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef float LooseLanes __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t LooseBits __attribute__((vector_size(32), aligned(2), may_alias));

inline Lanes load(const float* at) { return *reinterpret_cast<const LooseLanes*>(at); }
inline Bits load(const uint16_t* at) { return *reinterpret_cast<const LooseBits*>(at); }

// 16 entries as two vectors: the first and the last 8 of float32, the even and the odd ones of bfloat16, which is the upper
// half of a float32. What they are multiplied with has to be in the same order, see `unpack`.
inline Lanes one(const float* at) { return load(at); }
inline Lanes two(const float* at) { return load(at + STRIDE / 2); }
inline Lanes one(const uint16_t* at) { return (Lanes)(load(at) << 16); }
inline Lanes two(const uint16_t* at) { return (Lanes)(load(at) & 0xffff0000u); }

// float32 in the order of `one` and `two`.
template <typename T>
inline void unpack(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += STRIDE) {
    *reinterpret_cast<LooseLanes*>(to + i) = one(from + i);
    *reinterpret_cast<LooseLanes*>(to + i + STRIDE / 2) = two(from + i);
  }
}

inline Lanes fused(Lanes a, Lanes b, Lanes sum) {
#ifdef __FMA__
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);  // said, not left to the compiler: one rounding, always
#else
  return a * b + sum;
#endif
}

// The sums over the lanes of eight vectors; that of vector i is in lane LANE_OF[i].
constexpr int LANE_OF[8] = {0, 4, 1, 5, 2, 6, 3, 7};

inline Lanes sums(const Lanes* a) {
  Lanes b[4], c[2];
  for (int i = 0; i < 4; i++)
    b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; i++)
    c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(c[0], c[1], 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(c[0], c[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t rounded(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Tensor borrowed(AtenTensorHandle handle) {
  AtenTensorHandle own;
  aoti_torch_new_tensor_handle(handle, &own);
  return Tensor(own);
}

}  // namespace
