// x @ weight^T with a weight of 8 or 4 bits, for any number of rows of float32 or bfloat16, on any CPU that has a C++ compiler.
//
// GROUP entries of a row of the weight share a scale, with 4 bits also an offset, and so do as many of a row of x, which are
// rounded first, to whole numbers of 16 bits. What is summed within a group is whole numbers, hence exact; groups are added up
// in their order. A row of x is therefore multiplied the same, bit for bit, whatever is beside it. 16 rows of the weight lie
// side by side, one in each lane, and the weight is read once, from its beginning to its end: memory decides, also with four
// rows of x.

namespace {

constexpr int64_t GROUP = 32;     // entries that share a scale
constexpr int64_t BESIDE = 16;    // rows of the weight that lie side by side

#if defined(__AVX512BW__)
constexpr int64_t WIDTH = 64;     // bytes of the processor's vectors: compilers are slow with wider ones
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 32;
#else
constexpr int64_t WIDTH = 16;
#endif
constexpr int64_t LANES = WIDTH / 4, PARTS = BESIDE / LANES;  // vectors for one entry of 16 rows

typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int32_t Ints __attribute__((vector_size(WIDTH)));
typedef uint32_t LongWords __attribute__((vector_size(WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(WIDTH)));
typedef uint16_t Words __attribute__((vector_size(WIDTH)));
typedef uint16_t Scales __attribute__((vector_size(WIDTH / 2), aligned(2), may_alias));
typedef Words LooseWords __attribute__((aligned(1), may_alias));
typedef Floats LooseFloats __attribute__((aligned(4), may_alias));
typedef int16_t Packed __attribute__((vector_size(16), aligned(2), may_alias));

constexpr int32_t MOST = 32767;  // the largest entry of x

// Rows of x as whole numbers. Of four entries the first and the third come first, as `dot` takes them; by group there are the
// scale and the sum of the entries.
struct Rounded {
  const int16_t* entries;
  const float* scales;
  const int32_t* sums;
};

// Two entries of x, in every lane.
inline Shorts pair(const int16_t* x) {
  int32_t two;
  std::memcpy(&two, x, sizeof two);
  return (Shorts)(Ints{} + two);
}

// In each lane: sum + the products of two entries of the weight and two of x.
inline Ints dot(Ints sum, Shorts weight, Shorts x) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weight, (__m512i)x);
#elif defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)weight, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)weight, (__m256i)x);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)weight, (__m256i)x);
#elif defined(__SSE2__)
  return sum + (Ints)_mm_madd_epi16((__m128i)weight, (__m128i)x);
#else
  return sum + ((Ints)weight >> 16) * ((Ints)x >> 16) + ((Ints)weight << 16 >> 16) * ((Ints)x << 16 >> 16);
#endif
}

#if defined(__AVX512BW__)
inline Floats fused(Floats a, Floats b, Floats sum) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum); }
#elif !defined(__AVX2__)
inline Floats fused(Floats a, Floats b, Floats sum) { return a * b + sum; }
#endif

// float16, which is finite, as float32.
inline Floats halves(const uint16_t* at) {
#if defined(__AVX512BW__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
  const LongWords bits = __builtin_convertvector(*reinterpret_cast<const Scales*>(at), LongWords);
  return (Floats)((bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13) * 0x1p112f;
#endif
}

// What is fetched while a line of the weight is read. AMD's processors since Zen 3 wait for many lines at a time: there it lies
// NEAR bytes ahead, a third to a half faster than from STREAMS, which others need (LOG.md).
#if defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
constexpr int64_t NEAR = 1 << 14;
#else
constexpr int64_t NEAR = 0;
#endif

// Bytes of 16 rows of a weight.
inline int64_t block_bytes(int64_t groups, int64_t bits) { return groups * GROUP * BESIDE * bits / 8; }

// What is read after blocks of 16 rows: where it begins, and the bytes of its own blocks.
struct Next {
  const uint8_t* from;
  int64_t apart;
};

// R rows of x against 16 rows of the weight -> y: (R, 16). Meanwhile as many bytes are fetched, NEAR or else in STREAMS from
// `ahead`, as in `tile`; `done` lines of them were fetched before.
template <int R, int BITS>
inline __attribute__((always_inline)) void beside(
    const uint8_t* weight, const uint16_t* scale, const Rounded& x, int64_t groups, float (*y)[BESIDE],
    const uint8_t* const* ahead, uint64_t done) {
  constexpr int64_t LINE = 64, STEPS = BITS;     // bytes of 16 rows that lie together, and how many lines a group has
  constexpr int32_t ZERO = BITS == 8 ? 128 : 0;  // what stands for 0 where no entry has a sign, which is faster to widen
  constexpr uint16_t ZEROS = ZERO << 8 | ZERO;
  Floats total[R][PARTS] = {};
  for (int64_t g = 0; g < groups; g++) {
    const int16_t* const entries = x.entries + g * GROUP;
    Ints sum[R][PARTS];
    for (int r = 0; r < R; r++)
      for (int p = 0; p < PARTS; p++) sum[r][p] = Ints{} - ZERO * x.sums[r * groups + g];
#pragma GCC unroll 1
    for (int64_t j = 0; j < STEPS; j++, weight += LINE, done++) {
      __builtin_prefetch(NEAR ? weight + NEAR : ahead[done % STREAMS] + done / STREAMS * LINE);
      Words w[PARTS];  // in each lane four bytes, and in each half of it the first or third and the second or fourth of them
      for (int p = 0; p < PARTS; p++) w[p] = *reinterpret_cast<const LooseWords*>(weight + p * WIDTH) ^ ZEROS;
      const auto add = [&](const auto& part, int64_t at) __attribute__((always_inline)) {
        for (int r = 0; r < R; r++) {
          const Shorts two = pair(entries + r * groups * GROUP + at);
          for (int p = 0; p < PARTS; p++) sum[r][p] = dot(sum[r][p], part(w[p]), two);
        }
      };
      if constexpr (BITS == 8) {
        add([](Words bytes) { return (Shorts)(bytes & 255); }, 4 * j);
        add([](Words bytes) { return (Shorts)(bytes >> 8); }, 4 * j + 2);
      } else {
        add([](Words bytes) { return (Shorts)(bytes & 15); }, 8 * j);
        add([](Words bytes) { return (Shorts)(bytes >> 8 & 15); }, 8 * j + 2);
        add([](Words bytes) { return (Shorts)(bytes >> 4 & 15); }, 8 * j + 4);
        add([](Words bytes) { return (Shorts)(bytes >> 12); }, 8 * j + 6);
      }
    }
    const uint16_t* const of_group = scale + g * (BITS == 8 ? 1 : 2) * BESIDE;
    for (int p = 0; p < PARTS; p++) {
      const Floats scales = halves(of_group + p * LANES);
      const Floats offsets = BITS == 4 ? halves(of_group + BESIDE + p * LANES) : scales;
      for (int r = 0; r < R; r++) {
        const int64_t at = r * groups + g;
        total[r][p] = fused(__builtin_convertvector(sum[r][p], Floats) * x.scales[at], scales, total[r][p]);
        if (BITS == 4) total[r][p] = fused(Floats{} + x.scales[at] * x.sums[at], offsets, total[r][p]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < PARTS; p++) *reinterpret_cast<LooseFloats*>(y[r] + p * LANES) = total[r][p];
}

// Blocks [begin, end) of 16 columns of y = x @ weight^T + bias; y: (rows, out).
template <int BITS, typename T>
void blocks_of(const uint8_t* weight, const uint16_t* scale, const Rounded& x, const T* bias, T* y, int64_t rows, int64_t groups,
             int64_t out, int64_t begin, int64_t end, Next next) {
  const int64_t bytes = block_bytes(groups, BITS);
  const uint8_t* ahead[STREAMS];
  for (int64_t block = begin; block < end; block++) {
    const int64_t place = (block - begin) % STREAMS, following = block + STREAMS;
    if (place == 0)
      for (int64_t i = 0; i < STREAMS; i++)
        ahead[i] = following + i < end ? weight + (following + i) * bytes : next.from + (following + i - end) * next.apart;
    const uint8_t* const w = weight + block * bytes;
    const uint64_t done = place * groups * BITS;  // lines of the following blocks, that the ones before this fetched
    const uint16_t* const s = scale + block * groups * (BITS == 8 ? 1 : 2) * BESIDE;
    const int64_t column = block * BESIDE, count = std::min(BESIDE, out - column);
    T more[BESIDE] = {};
    if (bias) std::copy(bias + column, bias + column + count, more);
    int64_t count_of_rows;
    for (int64_t r = 0; r < rows; r += count_of_rows) {
      float sums[4][BESIDE];
      const Rounded from = {x.entries + r * groups * GROUP, x.scales + r * groups, x.sums + r * groups};
      count_of_rows = std::min<int64_t>(4, rows - r);
      if (count_of_rows == 4) beside<4, BITS>(w, s, from, groups, sums, ahead, done);
      if (count_of_rows == 3) beside<3, BITS>(w, s, from, groups, sums, ahead, done);
      if (count_of_rows == 2) beside<2, BITS>(w, s, from, groups, sums, ahead, done);
      if (count_of_rows == 1) beside<1, BITS>(w, s, from, groups, sums, ahead, done);
      for (int64_t i = 0; i < count_of_rows; i++) {
        T part[BESIDE];
        put(load(sums[i]) + wide(more), part);
        put(load(sums[i] + 8) + wide(more + 8), part + 8);
        std::copy(part, part + count, y + (r + i) * out + column);
      }
    }
  }
}

// One group of x in whole numbers: the largest magnitude becomes MOST, ties go to even. What is not finite makes the scale nan;
// a group so small that float32 does not hold the factor is as good as zeros.
template <typename T>
inline void round_group(const T* x, int16_t* entries, float* scale, int32_t* sum) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
  Lanes parts[GROUP / 8], largest = {}, nothing = {};
  for (int i = 0; i < GROUP / 8; i++) {
    parts[i] = wide(x + 8 * i);
    const Lanes magnitude = (Lanes)((Bits)parts[i] & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
    nothing += parts[i] * 0.0f;
  }
  float most = 0, poison = 0;
  for (int i = 0; i < 8; i++) most = std::max(most, largest[i]), poison += nothing[i];
  const float wanted = most > 0 ? MOST / most : 0.0f, factor = wanted <= 0x1.fffffep127f ? wanted : 0.0f;
  Whole total = {};
  for (int i = 0; i < GROUP / 8; i++) {
    const Lanes scaled = held(parts[i] * factor);  // a fused addition would round once, and elsewhere
    const Whole whole = (Whole)(scaled + MAGIC) - (Whole)(Lanes{} + MAGIC);
    total += whole;
    *reinterpret_cast<Packed*>(entries + 8 * i) = __builtin_convertvector(SHUFFLED(whole, whole, 0, 2, 1, 3, 4, 6, 5, 7), Packed);
  }
  *scale = most / MOST + poison;
  *sum = 0;
  for (int i = 0; i < 8; i++) *sum += total[i];
}

// Groups of x in whole numbers, in the thread's scratch.
template <typename T>
Rounded rounded_groups(const T* x, int64_t count) {
  float* const room = scratch(count * (GROUP / 2 + 2));
  auto* const entries = reinterpret_cast<int16_t*>(room);
  float* const scales = room + count * (GROUP / 2);
  auto* const sums = reinterpret_cast<int32_t*>(scales + count);
  for (int64_t i = 0; i < count; i++) round_group(x + i * GROUP, entries + i * GROUP, scales + i, sums + i);
  return {entries, scales, sums};
}

template <int BITS, typename T>
void multiply_quantized(const T* x, const uint8_t* weight, const uint16_t* scale, const T* bias, T* y, int64_t rows,
                        int64_t groups, int64_t out) {
  const Rounded from = rounded_groups(x, rows * groups);
  const int64_t grain = std::max<int64_t>(1, WORK / (groups * GROUP * BESIDE));
  shared((out + BESIDE - 1) / BESIDE, grain, [&](int64_t first, int64_t last) {
    const int64_t bytes = block_bytes(groups, BITS);
    blocks_of<BITS>(weight, scale, from, bias, y, rows, groups, out, first, last, {weight + last * bytes, bytes});
  });
}

// x: (..., in), weight: (blocks, in / 4, 16, 4) int8 or (blocks, in / 8, 16, 4) uint8, scale: (blocks, in / 32, 1 or 2, 16), the
// bits of float16 as int16, with uint8 scales and offsets, bias: (out,) or null -> (..., out).
AtenTensorHandle quantized_matmul(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale, AtenTensorHandle bias, int64_t out) {
  const View from(x), w(weight), s(scale);
  require(from.dims >= 1 && from.dims <= MOST_DIMS, "quantized_matmul: x has no dimension, or more than 8.");
  require(from.floating(), "quantized_matmul: x must be float32 or bfloat16.");
  const bool eight = w.dtype == aoti_torch_dtype_int8();
  require(eight || w.dtype == aoti_torch_dtype_uint8(), "quantized_matmul: weight must be int8, or uint8 with two in a byte.");
  require(w.dims == 4 && w.sizes[2] == BESIDE && w.sizes[3] == 4 && w.contiguous(),
          "quantized_matmul: weight must be contiguous, (blocks, entries, 16, 4).");
  require(out > 0 && w.sizes[0] == (out + BESIDE - 1) / BESIDE, "quantized_matmul: weight must have a block for every 16 of out.");
  const int64_t in = w.sizes[1] * (eight ? 4 : 8);
  require(from.sizes[from.dims - 1] == in, "quantized_matmul: the last size of x must be the inner size of weight.");
  require(in > 0 && in % GROUP == 0, "quantized_matmul: the inner size must be a positive multiple of 32.");
  const int64_t groups = in / GROUP;
  require(s.dtype == aoti_torch_dtype_int16() && s.dims == 4 && s.contiguous() && s.sizes[0] == w.sizes[0] &&
              s.sizes[1] == groups && s.sizes[2] == (eight ? 1 : 2) && s.sizes[3] == BESIDE,
          "quantized_matmul: scale must be contiguous int16, (blocks, inner size / 32, 1 or 2 with uint8, 16).");
  if (bias) {
    const View b(bias);
    require(b.dims == 1 && b.sizes[0] == out, "quantized_matmul: bias must have one dimension, of out entries.");
    require(b.dtype == from.dtype && b.contiguous(), "quantized_matmul: bias must be contiguous and have the dtype of x.");
  }
  if (!from.contiguous()) return quantized_matmul(torch::stable::contiguous(borrowed(x)).get(), weight, scale, bias, out);
  const int64_t rows = from.count() / in;
  const AtenTensorHandle result = empty_product(from, out);
  const View to(result);
  const void* const b = bias ? View(bias).data : nullptr;
  const auto run = [&](auto bits, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    multiply_quantized<bits>(from.as<T>(), w.as<uint8_t>(), s.as<uint16_t>(), static_cast<const T*>(b), to.as<T>(), rows, groups,
                             out);
  };
  const auto of_type = [&](auto* type) {
    if (eight) run(std::integral_constant<int, 8>{}, type);
    else run(std::integral_constant<int, 4>{}, type);
  };
  if (from.dtype == aoti_torch_dtype_float32()) of_type(static_cast<float*>(nullptr));
  else of_type(static_cast<uint16_t*>(nullptr));
  return result;
}

Tensor quantized_matmul_of(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, int64_t out) {
  return Tensor(quantized_matmul(x.get(), weight.get(), scale.get(), bias ? bias->get() : nullptr, out));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dynamo_lm, library) {
  library.def("quantized_matmul(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int out) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dynamo_lm, CPU, library) { library.impl("quantized_matmul", TORCH_BOX(&quantized_matmul_of)); }

extern "C" __attribute__((visibility("default"))) AOTITorchError dynamo_lm_quantized_matmul(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scale, AtenTensorHandle* bias, int64_t out,
    AtenTensorHandle* result) {
  *result = quantized_matmul(x, weight, scale, bias ? *bias : nullptr, out);
  return AOTI_TORCH_SUCCESS;
}
