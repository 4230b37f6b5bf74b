// What the kernels share: vectors of eight float32, bfloat16 as halves of them, sums that are always in one order.
//
// Every result of a kernel is summed in an order that depends on nothing but the problem of its own row: it is the same, bit for
// bit, whichever rows are computed beside it and however many threads share the work.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

using torch::stable::Tensor;

constexpr int64_t STRIDE = 16;  // entries that are taken at a time: two of bfloat16 lie in one 32-bit lane

constexpr int64_t MOST_DIMS = 8;

inline void checked(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch refused a call of a kernel");
}

// A precondition of a kernel, refused in one sentence: it reads memory by what the sizes say.
inline void require(bool holds, const char* otherwise) {
  if (!holds) throw std::runtime_error(otherwise);
}

typedef float Lanes __attribute__((vector_size(32)));
typedef float FourLanes __attribute__((vector_size(16)));
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
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);  // explicit, not left to the compiler: always one rounding
#else
  return a * b + sum;
#endif
}

// The same, in a register from here on: GCC would load it again for every use, and loads would then be what takes the time.
inline Lanes held(Lanes value) {
#ifdef __FMA__
  asm("" : "+x"(value));
#endif
  return value;
}

typedef int32_t Whole __attribute__((vector_size(32)));

// e^x of numbers that are not positive; what is below the least float is 0.
inline Lanes exponential(Lanes x) {
  const Lanes low = x < -87.0f ? Lanes{} - 87.0f : x;
  const Whole n = __builtin_convertvector(low * 1.44269504088896f - 0.5f, Whole);
  const Lanes whole = __builtin_convertvector(n, Lanes);
  const Lanes r = fused(whole, Lanes{} + 2.12194440e-4f, fused(whole, Lanes{} - 0.693359375f, low));  // ln 2 in two parts
  Lanes p = Lanes{} + 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fused(p, r, Lanes{} + c);
  p = fused(p, r * r, r) + 1.0f;
  return x < -87.0f ? Lanes{} : p * (Lanes)((n + 127) << 23);
}

// Entries of two vectors, counted through both. GCC has clang's name for it since version 12.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Whole){__VA_ARGS__})
#endif

// The sums over the lanes of eight vectors, that of vector i in lane i.
inline Lanes sums(const Lanes* a) {
  Lanes b[4], c[2];
  for (int i = 0; i < 4; i++)
    b[i] = SHUFFLED(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLED(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  for (int i = 0; i < 2; i++)
    c[i] = SHUFFLED(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           SHUFFLED(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return SHUFFLED(c[0], c[1], 0, 2, 8, 10, 4, 6, 12, 14) +
         SHUFFLED(c[0], c[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

// float32 as bfloat16, to the nearest, ties to even: the lower half of every lane.
inline Bits rounded(Lanes values) {
  const Bits bits = (Bits)values;
  return values != values ? Bits{} + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Eight entries in the order in which they lie, as float32 and back.
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint16_t LooseHalves __attribute__((vector_size(16), aligned(2), may_alias));

inline Lanes wide(const float* at) { return load(at); }
inline Lanes wide(const uint16_t* at) {
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const LooseHalves*>(at), Bits) << 16);
}
inline void put(Lanes values, float* to) { *reinterpret_cast<LooseLanes*>(to) = values; }
inline void put(Lanes values, uint16_t* to) {
  *reinterpret_cast<LooseHalves*>(to) = __builtin_convertvector(rounded(values), Halves);
}

// A tensor as a kernel sees it. Read once, by torch's plain C functions: the classes over them cost more than a small product.
struct View {
  void* data;
  int64_t dims;
  int64_t *sizes, *strides;
  int32_t dtype;

  View(void* data, int64_t dims, int64_t* sizes, int64_t* strides, int32_t dtype)
      : data(data), dims(dims), sizes(sizes), strides(strides), dtype(dtype) {}

  explicit View(AtenTensorHandle tensor) {
    checked(aoti_torch_get_data_ptr(tensor, &data));
    checked(aoti_torch_get_dim(tensor, &dims));
    checked(aoti_torch_get_sizes(tensor, &sizes));
    checked(aoti_torch_get_strides(tensor, &strides));
    checked(aoti_torch_get_dtype(tensor, &dtype));
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  bool floating() const { return dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_bfloat16(); }

  int64_t count() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dims; d++) product *= sizes[d];
    return product;
  }

  bool contiguous() const {
    int64_t step = 1;
    for (int64_t d = dims; d-- > 0; step *= std::max<int64_t>(1, sizes[d]))  // as torch lays out what is empty
      if (sizes[d] != 1 && strides[d] != step) return false;
    return true;
  }
};

inline AtenTensorHandle empty(const int64_t* sizes, int64_t dims, int32_t dtype) {
  std::array<int64_t, MOST_DIMS> strides;
  int64_t step = 1;
  for (int64_t d = dims; d-- > 0; step *= sizes[d]) strides[d] = step;
  AtenTensorHandle made;
  checked(aoti_torch_empty_strided(dims, sizes, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return made;
}

// Uninitialized results of a product with rows `from`, (..., in) -> (..., out).
inline AtenTensorHandle empty_product(const View& from, int64_t out) {
  std::array<int64_t, MOST_DIMS> shape;
  std::copy(from.sizes, from.sizes + from.dims - 1, shape.begin());
  shape[from.dims - 1] = out;
  return empty(shape.data(), from.dims, from.dtype);
}

inline Tensor borrowed(AtenTensorHandle handle) {
  AtenTensorHandle own;
  checked(aoti_torch_new_tensor_handle(handle, &own));
  return Tensor(own);
}

// Room for so many numbers, the calling thread's own, until it asks again for the same `USE`. It begins with a line of the caches, so that no
// vector in it lies in two of them.
template <int USE = 0>
inline float* scratch(int64_t count) {
  struct alignas(64) Line {
    float entries[16];
  };
  thread_local std::vector<Line> room;
  if (static_cast<int64_t>(room.size()) * 16 < count) room.resize(count / 16 + 1);
  return reinterpret_cast<float*>(room.data());
}

// Calls `part` on parts of [0, count) in several threads, or on all of it where it is too little to share.
template <typename F>
inline void shared(int64_t count, int64_t grain, const F& part) {
  if (count <= grain) part(0, count);
  else torch::stable::parallel_for(0, count, grain, part);
}

}  // namespace
